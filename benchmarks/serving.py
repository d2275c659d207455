"""examples/serve.py under load on 127.0.0.1: a SLAB model and its LayerNorm baseline, each on its fastest engine.

    python benchmarks/serving.py                    # slab_deit_tiny at 224 px; a few minutes
    python benchmarks/serving.py --requests 1000 --clients 16

Both models (random weights, on which speeds do not depend) are written by `sf.deploy(target="auto")` and served by a
process of their own. Clients upload the same JPEGs over kept connections, each waiting for its answer before it sends
the next, in rounds that the two servers take in turns. Then slab_deit_micro is served 10,000 images of many sizes while
its memory is watched; a bad upload, a queue that is full and Ctrl-C with requests under way are tried on it, too.
Everything is bounded in number and time. Writes serving.json, serving.md and serving.png into
benchmarks/results/serving (or --output).
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from compare import baseline, trained_looking
from PIL import Image

import slabformer as sf
from slabformer.measure.timing import Machine, num_threads, quantile

RESULTS = Path(__file__).parent / "results" / "serving"
SERVE = Path(__file__).parents[1] / "examples" / "serve.py"
BOUNDARY = "slabformer"
PATIENCE = 60.0
#: of the model that is served for its memory
MICRO = "slab_deit_micro"


def upload(data: bytes) -> bytes:
    """Body of a form with one file."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def photos(sizes: Sequence[int], kind: str, seed: int = 0) -> list[bytes]:
    """Uploads of smooth random images, square."""
    draw, bodies = np.random.default_rng(seed), []
    for size in sizes:
        image = Image.fromarray(draw.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((size, size))
        file = io.BytesIO()
        image.save(file, kind)
        bodies.append(upload(file.getvalue()))
    return bodies


def write_model(model: torch.nn.Module, size: int, folder: Path, target: str, seconds: float) -> str:
    """Deploy ``model`` into ``folder``; returns the engine that was taken."""
    preprocessing = {"channels": 3, "height": size, "width": size, "interpolation": "bicubic", "crop_pct": 0.875}
    preprocessing |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    with torch.no_grad():
        deployed = sf.deploy(model, torch.randn(4, 3, size, size), target=target, seconds=seconds, budget=30)
    deployed.save(folder, preprocessing=preprocessing)
    return deployed.report.taken


class Server:
    """A service of a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(SERVE), str(folder), "--port", str(self.port), "--threads", "1", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.memory = psutil.Process(self.process.pid)
        deadline = time.monotonic() + 3 * PATIENCE
        while True:
            try:
                assert self.get("/health")["status"] == "ok"
                return
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start: {self.process.communicate()[1]}") from error
                time.sleep(0.25)

    def get(self, path: str) -> Any:
        connection = self.connection()
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def stop(self) -> tuple[float, int, str]:
        """Ctrl-C; returns seconds until the process was gone, its exit code, and what it said."""
        begun = time.perf_counter()
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=PATIENCE)
        return time.perf_counter() - begun, self.process.returncode, said


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    server = Server(folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            server.process.communicate(timeout=PATIENCE)


def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, str]:
    connection.request("POST", "/classify", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def load(server: Server, bodies: Sequence[bytes], requests: int, clients: int, watch: Any = None) -> dict[str, Any]:
    """``requests`` in all from ``clients`` that each wait for their answer: seconds each, seconds in all, statuses."""
    numbers, lock, seconds, statuses = count(), threading.Lock(), list[float](), Counter[int]()

    def client() -> None:
        connection = server.connection()
        while (number := next(numbers)) < requests:
            begun = time.perf_counter()
            status, _ = post(connection, bodies[number % len(bodies)])
            with lock:
                seconds.append(time.perf_counter() - begun)
                statuses[status] += 1
                if watch is not None:
                    watch(len(seconds))
        connection.close()

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
    return {"seconds": seconds, "wall": time.perf_counter() - begun, "statuses": dict(statuses)}


def speeds(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Latency and throughput of both models, in turns."""
    models = {options.model: trained_looking(options.model, 224), "LayerNorm baseline": baseline(options.model, 224)}
    engines = {
        name: write_model(model, 224, folder / str(index), options.target, options.seconds)
        for index, (name, model) in enumerate(models.items())
    }
    bodies, found = photos([320] * 16, "JPEG"), {name: list[dict[str, Any]]() for name in models}
    with served(folder / "0") as first, served(folder / "1") as second:
        servers = dict(zip(models, (first, second), strict=True))
        for server in servers.values():
            load(server, bodies, 2 * options.clients, options.clients)
        for turn in range(options.rounds):
            for name in list(servers)[:: 1 if turn % 2 else -1]:
                found[name].append(load(servers[name], bodies, options.requests // options.rounds, options.clients))
    rows = []
    for name, rounds in found.items():
        seconds = sorted(second for each in rounds for second in each["seconds"])
        assert all(set(each["statuses"]) == {200} for each in rounds)
        rows.append(
            {
                "model": name,
                "engine": engines[name],
                "requests": len(seconds),
                "p50_ms": round(1e3 * seconds[len(seconds) // 2], 1),
                "p99_ms": round(1e3 * seconds[int(0.99 * len(seconds))], 1),
                "images_per_second": round(quantile([[len(r["seconds"]) / r["wall"]] for r in rounds], 0.5), 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def memory(server: Server, requests: int, clients: int) -> list[tuple[int, float]]:
    """MiB of the service after so many requests, of images of many sizes."""
    curve = [(0, server.memory.memory_info().rss / 2**20)]

    def watch(done: int) -> None:
        if done % max(1, requests // 100) == 0:
            curve.append((done, server.memory.memory_info().rss / 2**20))

    bodies = photos([24 + 8 * step for step in range(40)], "PNG")
    result = load(server, bodies, requests, clients, watch)
    assert result["statuses"] == {200: requests}, result["statuses"]
    return [(done, round(size, 2)) for done, size in curve]


def manners(folder: Path) -> dict[str, Any]:
    """A bad upload, a full queue, and Ctrl-C with requests under way."""
    body = photos([64], "PNG")[0]
    with served(folder, "--max-batch", "1", "--max-waiting", "1") as server:
        connection = server.connection()
        bad = post(connection, upload(b"no image"))
        crowd = load(server, [body], 400, 16)
        answered = Counter[int]()

        def ask() -> None:
            try:
                answered[post(server.connection(), body)[0]] += 1
            except OSError:
                answered[0] += 1  # refused: it came after Ctrl-C

        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        seconds, code, said = server.stop()
        for thread in asking:
            thread.join(PATIENCE)
    return {
        "bad_upload": {"status": bad[0], "answer": bad[1]},
        "full_queue": crowd["statuses"],
        "ctrl_c": {
            "seconds": round(seconds, 2),
            "exit_code": code,
            "traceback": "Traceback" in said,
            "last_line": said.splitlines()[-1],
        },
        "asked_during_ctrl_c": dict(answered),
    }


def write(result: dict[str, Any], folder: Path) -> None:
    """Figures, tables and plot."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serving.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows, curve = result["speeds"], result["memory"]
    lines = ["# Serving", ""]
    if rows:
        lines += [f"| {' | '.join(rows[0])} |", "|---|---|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
        lines += ["", "Latency and throughput: JPEGs of 320 px."]
    start = next(size for done, size in curve if done >= curve[-1][0] / 10)
    lines += [
        "",
        f"{result['clients']} clients, batches of up to 8, one thread of the runtime.",
        "",
        f"Memory of {MICRO}: {curve[0][1]:.0f} MiB before the first request, {start:.0f} after a tenth and "
        f"{curve[-1][1]:.0f} after all {curve[-1][0]:,}.",
        "",
        f"A bad upload: {result['bad_upload']}. A queue of one under 16 clients: {result['full_queue']} (by status). "
        f"Ctrl-C under 8 requests: {result['ctrl_c']}; what these got: {result['asked_during_ctrl_c']} (0: refused).",
        "",
        result["machine"],
        "",
    ]
    (folder / "serving.md").write_text("\n".join(lines), encoding="utf-8")
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.plot(*zip(*curve, strict=True))
    axis.set(
        xlabel="requests",
        ylabel="memory of the service, MiB",
        ylim=(0, 1.2 * max(size for _, size in curve)),
        title=f"{MICRO}, images of 40 sizes",
    )
    figure.tight_layout()
    figure.savefig(folder / "serving.png", dpi=110)
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slab_deit_tiny")
    parser.add_argument("--target", default="auto", help="engine of both models; auto takes the fastest for each")
    parser.add_argument("--seconds", type=float, default=10.0, help="to choose the engine in")
    parser.add_argument("--requests", type=int, default=320, help="to each model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8, help="that the models take in turns")
    parser.add_argument("--memory-requests", type=int, default=10_000)
    parser.add_argument("--no-speeds", action="store_true", help="memory, overload and Ctrl-C alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with num_threads(1), tempfile.TemporaryDirectory() as place:
        folder, machine = Path(place), str(Machine.here(torch.device("cpu")))
        micro = timm.create_model(MICRO, img_size=32)
        sf.testing.randomize_norms_(micro)
        for norm in (module for module in micro.modules() if isinstance(module, sf.PRepBN)):
            norm.set_gamma(0.0)
        write_model(micro.eval(), 32, folder / "micro", "onnxruntime", 0)
        result = manners(folder / "micro")
        print(result, flush=True)
        with served(folder / "micro") as server:
            result["memory"] = memory(server, options.memory_requests, options.clients)
        print(result["memory"][:: max(1, len(result["memory"]) // 10)], flush=True)
        result["speeds"] = [] if options.no_speeds else speeds(options, folder)
    write({**result, "clients": options.clients, "machine": machine}, options.output)


if __name__ == "__main__":
    main()
