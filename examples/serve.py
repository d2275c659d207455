"""A deployed classifier behind HTTP: an image in, class names and scores out, whatever waits computed as one batch.

    pip install 'slabformer[serve]'
    slab deploy runs/digits/model.safetensors --data digits --output deployed
    python examples/serve.py deployed
    curl -F image=@photo.png http://127.0.0.1:8000/classify
    curl http://127.0.0.1:8000/health

Images are decoded by a pool of threads and wait in a queue. One thread runs the model on all that wait, up to
`--max-batch`, while the next ones arrive: a lone request is not held back. Batches are filled up to a power of two, so
that the runtime meets a few sizes only. A full queue answers 503, an upload that is no image 400, one that is too large
413, each in one line. Ctrl-C answers what has come in, then stops.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, BinaryIO

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import slabformer as sf
from slabformer.deployment.artifact import ArtifactError, LoadedModel
from slabformer.surgery.verify import VerificationError
from slabformer.tasks.classification.predict import deployed_transform
from slabformer.tasks.images import UNREADABLE, read_image, reason_of

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
TOP = 5


class OverloadedError(RuntimeError):
    """As many images wait as may."""


class Batcher:
    """Single images to rows of outputs, computed together.

    Args:
        model: ``(B, ...)`` to ``(B, classes)``.
        max_batch: Images that are computed at once.
        max_waiting: Images that may wait for it.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], max_batch: int, max_waiting: int) -> None:
        self.model, self.max_batch = model, max_batch
        self.waiting: asyncio.Queue[tuple[Tensor, asyncio.Future[Tensor]]] = asyncio.Queue(max_waiting)
        self.thread = ThreadPoolExecutor(1, "model")

    async def __call__(self, image: Tensor) -> Tensor:
        """The output for ``image``.

        Raises:
            OverloadedError: If the queue is full.
        """
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait((image, answer))
        except asyncio.QueueFull as error:
            raise OverloadedError(f"{self.waiting.maxsize} images wait already; try again") from error
        return await answer

    async def run(self) -> None:
        """Compute what comes, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            batch = [(image, answer) for image, answer in batch if not answer.done()]  # others have hung up
            if not batch:
                continue
            images, answers = zip(*batch, strict=True)
            try:
                rows = await loop.run_in_executor(self.thread, self.compute, torch.stack(images))
            except Exception as error:  # whatever a runtime raises is the answer to these images, not the end
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for answer, row in zip(answers, rows, strict=True):
                    if not answer.done():
                        answer.set_result(row)

    def compute(self, images: Tensor) -> Tensor:
        """Outputs for ``images``, filled up to the next power of two."""
        missing = min(1 << (len(images) - 1).bit_length(), self.max_batch) - len(images)
        return self.model(torch.cat([images, images[:1].expand(missing, *images.shape[1:])]))[: len(images)]

    def warm_up(self, shape: tuple[int, ...]) -> None:
        """Meet every size of batch once; an image is of ``shape``."""
        for size in {min(1 << power, self.max_batch) for power in range(self.max_batch.bit_length() + 1)}:
            self.compute(torch.zeros(size, *shape))


def create_app(model: LoadedModel, max_batch: int = 8, max_waiting: int = 64) -> FastAPI:
    """The service.

    Args:
        model: A classifier of square RGB images.
        max_batch: See :class:`Batcher`.
        max_waiting: See :class:`Batcher`.

    Raises:
        ValueError: If the folder does not say how images become inputs.
    """
    given, names = model.manifest.preprocessing, model.manifest.class_names
    transform = deployed_transform(given)
    batcher = Batcher(model, max_batch, max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.warm_up((given["channels"], given["height"], given["width"]))
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()
        batcher.thread.shutdown()

    app = FastAPI(title="classifier", lifespan=lifespan)

    @app.middleware("http")
    async def bounded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length")
        if request.method == "POST" and length is None:
            return JSONResponse({"detail": "say how long the upload is (Content-Length)"}, 411)
        if length is not None and int(length) > MAX_BYTES:
            return JSONResponse({"detail": f"an upload may have {MAX_BYTES} bytes, this one has {length}"}, 413)
        return await call_next(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "target": model.manifest.target, "waiting": batcher.waiting.qsize()}

    def decode(file: BinaryIO) -> Tensor:
        with Image.open(file) as header:
            width, height = header.size
        if width * height > MAX_PIXELS:
            raise HTTPException(413, f"an image may have {MAX_PIXELS} pixels, this one is {width} x {height}")
        file.seek(0)
        return transform(read_image(file))

    @app.post("/classify")
    async def classify(image: UploadFile) -> dict[str, Any]:
        try:
            decoded = await run_in_threadpool(decode, image.file)
        except UnidentifiedImageError as error:
            raise HTTPException(400, "the upload is no image of a kind that can be read") from error
        except UNREADABLE as error:
            raise HTTPException(400, f"the image cannot be read: {reason_of(error)}") from error
        try:
            scores = (await batcher(decoded)).float().softmax(0)
        except OverloadedError as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
        best = scores.topk(min(TOP, len(scores)))
        return {
            "classes": [
                {"name": names[label] if names else str(label), "score": round(score, 4)}
                for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        }

    return app


def main() -> None:
    """Load, then serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="that `slab deploy` wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, help="of the runtime; its own choice by default")
    parser.add_argument("--max-batch", type=int, default=8, help="images computed at once")
    parser.add_argument("--max-waiting", type=int, default=64, help="images that may wait; others are told 503")
    options = parser.parse_args()
    try:
        app = create_app(
            sf.load_deployed(options.folder, threads=options.threads), options.max_batch, options.max_waiting
        )
    except (ArtifactError, FileNotFoundError, ImportError, ValueError, VerificationError) as error:
        parser.error(str(error))
    uvicorn.run(app, host=options.host, port=options.port, access_log=False)


if __name__ == "__main__":
    main()
