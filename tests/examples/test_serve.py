"""A deployed classifier behind HTTP, in this process: answers, batches, refusals, and threads that share a model."""

from __future__ import annotations

import asyncio
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

import slabformer as sf
from example_files import load_example
from slabformer.deployment.artifact import LoadedModel
from small_models import images, trained_looking
from tolerances import PATIENCE

pytest.importorskip("fastapi", reason="the service is FastAPI's")
from fastapi.testclient import TestClient

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PREPROCESSING = {
    **{"channels": 3, "height": 16, "width": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
    **{"interpolation": "bicubic", "crop_pct": 1.0},
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("serve")


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    pytest.importorskip(request.param)
    deployed = sf.deploy(trained_looking(), images(), target=request.param, seconds=0)
    folder = tmp_path_factory.mktemp("served") / request.param
    deployed.save(folder, preprocessing=PREPROCESSING, class_names=list("abcde"))
    return sf.load_deployed(folder, threads=1)


def photo(seed: int = 0, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    pixels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind)
    return file.getvalue()


def test_an_image_gets_the_classes_that_the_model_gives_it(example: ModuleType, model: LoadedModel) -> None:
    with TestClient(example.create_app(model)) as client:
        assert client.get("/health").json() == {"status": "ok", "target": model.manifest.target, "waiting": 0}
        answer = client.post("/classify", files={"image": photo()})
    assert answer.status_code == 200
    from slabformer.tasks.classification.predict import deployed_transform

    image = deployed_transform(PREPROCESSING)(Image.open(io.BytesIO(photo())))
    scores = model(image[None])[0].softmax(0)
    classes = answer.json()["classes"]
    assert [found["name"] for found in classes] == ["abcde"[label] for label in scores.argsort(descending=True)]
    assert classes[0]["score"] == pytest.approx(float(scores.max()), abs=1e-3)


@pytest.mark.parametrize(
    ("upload", "status", "said"),
    [
        ({"files": {"image": b"no image"}}, 400, "no image of a kind"),
        ({"files": {"image": photo()[:200]}}, 400, "the image cannot be read"),
        ({"files": {"image": b""}}, 400, "no image of a kind"),
        ({"files": {"image": bytes(11 * 2**20)}}, 413, "bytes"),
        ({"content": iter([b"x"])}, 411, "Content-Length"),
        ({"files": {"other": photo()}}, 422, "image"),
    ],
    ids=["text", "cut short", "empty", "too large", "of unknown length", "another field"],
)
def test_bad_uploads_are_refused_in_one_line(
    example: ModuleType, model: LoadedModel, upload: dict[str, object], status: int, said: str
) -> None:
    with TestClient(example.create_app(model)) as client:
        answer = client.post("/classify", **upload)
        assert answer.status_code == status
        assert said in answer.text
        assert "\n" not in answer.text
        assert client.post("/classify", files={"image": photo()}).status_code == 200  # it goes on


def test_images_of_too_many_pixels_are_refused_unread(
    example: ModuleType, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "MAX_PIXELS", 100)
    with TestClient(example.create_app(model)) as client:
        answer = client.post("/classify", files={"image": photo()})
    assert (answer.status_code, answer.json()["detail"]) == (413, "an image may have 100 pixels, this one is 16 x 20")


class Slow:
    """Waits to be let go; remembers the batches that it was given."""

    def __init__(self) -> None:
        self.batches, self.started, self.go = list[int](), threading.Event(), threading.Event()

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        self.started.set()
        assert self.go.wait(PATIENCE)
        return images.flatten(1)


def test_what_waits_is_computed_together_and_a_full_queue_says_so(example: ModuleType) -> None:
    slow = Slow()

    async def scenario() -> list[Tensor]:
        batcher = example.Batcher(slow, max_batch=4, max_waiting=6)
        running = asyncio.create_task(batcher.run())
        asked = [asyncio.create_task(batcher(torch.tensor([0.0])))]
        await asyncio.to_thread(slow.started.wait, PATIENCE)
        asked += [asyncio.create_task(batcher(torch.tensor([float(i)]))) for i in range(1, 7)]
        await asyncio.sleep(0)
        with pytest.raises(example.OverloadedError, match="6 images wait already"):
            await batcher(torch.tensor([7.0]))
        asked[6].cancel()  # hangs up
        slow.go.set()
        rows = await asyncio.gather(*asked[:6])
        running.cancel()
        batcher.thread.shutdown()
        return rows

    assert [float(row) for row in asyncio.run(scenario())] == [0, 1, 2, 3, 4, 5]
    assert slow.batches == [1, 4, 1]  # filled up to powers of two, without the one that hung up


def test_an_overloaded_service_answers_503(
    example: ModuleType, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(self: object, image: Tensor) -> Tensor:
        raise example.OverloadedError("64 images wait already; try again")

    monkeypatch.setattr(example.Batcher, "__call__", full)
    with TestClient(example.create_app(model)) as client:
        answer = client.post("/classify", files={"image": photo()})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json() == {"detail": "64 images wait already; try again"}


def test_what_the_runtime_raises_is_one_answer_and_the_next_one_is_computed(example: ModuleType) -> None:
    calls = []

    def fails_once(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("no memory")
        return images

    async def scenario() -> Tensor:
        batcher = example.Batcher(fails_once, max_batch=4, max_waiting=4)
        running = asyncio.create_task(batcher.run())
        with pytest.raises(RuntimeError, match="no memory"):
            await batcher(torch.ones(1))
        row = await batcher(torch.ones(1))
        running.cancel()
        return row

    assert torch.equal(asyncio.run(scenario()), torch.ones(1))


def test_threads_share_a_deployed_model(model: LoadedModel) -> None:
    batches = [images(1 + seed % 3, seed) for seed in range(24)]
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, batches))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_folder_is_classified_by_a_pool_and_the_unreadable_is_named(model: LoadedModel, tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(photo(index))
    (tmp_path / "6.png").write_bytes(b"no image")
    paths = sorted(tmp_path.iterdir())
    rows = list(load_example("classify_folder").classify(model, paths, workers=3))
    assert [row.path for row in rows] == [str(path) for path in paths]
    assert all(row.name in "abcde" and 0.2 <= row.score <= 1 for row in rows[:6])
    assert "cannot identify image file" in rows[6].error


def test_a_folder_without_preprocessing_is_refused(example: ModuleType, tmp_path: Path) -> None:
    sf.deploy(trained_looking(), images(), target="onnxruntime", seconds=0).save(tmp_path / "bare")
    with pytest.raises(ValueError, match="does not say how images become inputs"):
        example.create_app(sf.load_deployed(tmp_path / "bare"))
