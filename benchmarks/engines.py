"""In whose engine? Each SLAB model and its LayerNorm baseline in every engine that is installed, float and int8.

    python benchmarks/engines.py                                                # batch 1 and 8, one and two threads
    python benchmarks/engines.py --models slab_deit_tiny --targets openvino --batch-sizes 8 --threads 1

Random weights: speeds do not depend on them. All engines and forms of a model take turns in one process, with equal
threads, by CPU time, so that other work on the machine counts little; every form is held against its model first. The
baseline is rewritten for the engine as ours is, where the rewriting knows it. Writes engines.csv,
engines.md and engines.png into benchmarks/results/engines (or --output).
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from compare import baseline, trained_looking
from torch import Tensor, nn

import slabformer as sf
from slabformer.deployment.targeted import rtol_of
from slabformer.deployment.targets.base import Request, Target
from slabformer.deployment.targets.table import TARGETS, usable
from slabformer.export.program import Program
from slabformer.export.signature import flatten
from slabformer.figures.plots import latency_bars, save
from slabformer.measure.timing import Machine, num_threads
from slabformer.surgery.verify import verify

RESULTS = Path(__file__).parent / "results" / "engines"
COLUMNS = ("model", "batch_size", "threads", "form", "engine", "dtype", "cpu_ms_per_image", "over_best_baseline")
Key = tuple[str, str, str]


@torch.no_grad()
def written(model: nn.Module, target: Target, dtype: str, images: Tensor, threads: int, folder: Path) -> nn.Module:
    """``model`` in ``target``, verified."""
    signature, flat = flatten(model, images, batch=target.any_batch)
    calibration = [[images]] if dtype == "int8" else []
    folder.mkdir()
    target.write(Request(flat=flat, signature=signature, inputs=[images], dtype=dtype, calibration=calibration), folder)
    program = Program(signature, target.load(folder, dtype, threads))
    verify(model, program, images, rtol=rtol_of(dtype), lazy=True)
    return program


def cpu_times(calls: dict[Key, Callable[[], object]], seconds: float) -> dict[Key, list[float]]:
    """CPU seconds of each call, in turns, in an order drawn anew each round; the first two rounds do not count."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order, began, rounds = list(calls), time.monotonic(), -2
    while rounds < 5 or time.monotonic() - began < seconds:
        random.shuffle(order)
        for key in order:
            before = time.process_time()
            calls[key]()
            if rounds >= 0:
                times[key].append(time.process_time() - before)
        rounds += 1
    return times


def measure(name: str, batch_size: int, threads: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """One row a form, engine and dtype."""
    size = options.size
    images = torch.randn(batch_size, 3, size, size)
    fused, _ = sf.fuse(trained_looking(name, size), images[:1])
    calls: dict[Key, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as place, num_threads(threads), torch.no_grad():
        for form, model in {"SLAB": fused, "LayerNorm baseline": baseline(name, size)}.items():
            for target, dtype in options.engines:
                folder = Path(place) / f"{form}-{target.name}-{dtype}"
                program = written(model, target, dtype, images, threads, folder)
                calls[form, target.name, dtype] = partial(program, images)
        times = cpu_times(calls, options.seconds)
    rows = []
    for (form, engine, dtype), seconds in times.items():
        rivals = [statistics.median(t) for (other, _, d), t in times.items() if other != "SLAB" and d == dtype]
        own = statistics.median(seconds)
        row = (
            name,
            batch_size,
            threads,
            form,
            engine,
            dtype,
            round(1e3 * own / batch_size, 3),
            round(min(rivals) / own, 3),
        )
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["slab_deit_tiny", "slab_swin_tiny", "slab_pvt_tiny"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "int8"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=224, help="height and width of images")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each model, batch and threads")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.engines = []
    for name in options.targets:
        for dtype in options.dtypes:
            try:
                options.engines += [(target, dtype) for target in usable(name, dtype)[0]]
            except (ImportError, ValueError) as error:
                print(f"{name} in {dtype}: {error}")
    rows = [
        row
        for name in options.models
        for batch_size in options.batch_sizes
        for threads in options.threads
        for row in measure(name, batch_size, threads, options)
    ]
    write(rows, Machine.here(torch.device("cpu")), options.output)


def write(rows: list[dict[str, object]], machine: Machine, output: Path) -> None:
    """The table as CSV and Markdown, and a bar for every row of the first model."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "engines.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---|---|---|---:|---:|"]
    table += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    (output / "engines.md").write_text("\n".join(["# Engines", "", *table, "", str(machine), ""]), encoding="utf-8")
    shown = [row for row in rows if (row["model"], row["threads"]) == (rows[0]["model"], rows[0]["threads"])]
    bars = {f"{r['form']}, {r['engine']} {r['dtype']}, batch {r['batch_size']}": r["cpu_ms_per_image"] for r in shown}
    figure = latency_bars(bars, min(bars, key=bars.get), title=str(rows[0]["model"]), caption=str(machine))
    save(figure, output / "engines.png")
    print("\n".join(table))


if __name__ == "__main__":
    main()
