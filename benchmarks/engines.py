"""In whose engine? Each SLAB model and its LayerNorm baseline in every engine that is installed, float and int8.

    python benchmarks/engines.py                 # batch 1 and 8, one and two threads; what is measured stays
    python benchmarks/engines.py --build         # write the programs alone, which a later run measures
    python benchmarks/engines.py --models slab_deit_tiny --targets openvino --batch-sizes 8 --threads 1 --again

Random weights: speeds do not depend on them. All engines and forms of a model take turns in one process, with equal
threads; every form is held against its model first. The baseline is written for an engine as ours is. Programs are
kept in --programs: delete them when the code that writes them has changed. Each model, batch size and number of threads
is written to engines.csv when it is measured, so that a run that was interrupted goes on there. Ratios are of CPU time
with one thread, which other work on the machine hardly changes, and of wall time with more. Writes engines.csv,
engines.md and engines.png into benchmarks/results/engines (or --output), and from there the table in README.md.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare import baseline, read, trained_looking, write
from engines_table import BASELINE, SLAB, draw, into_readme, markdown

import slabformer as sf
from slabformer._torch import inductor_settings
from slabformer.deployment.targeted import rtol_of
from slabformer.deployment.targets.base import Request, Target
from slabformer.deployment.targets.table import TARGETS, usable
from slabformer.export.program import Program
from slabformer.export.refusals import UnsupportedError
from slabformer.export.signature import flatten
from slabformer.measure.timing import Machine, num_threads
from slabformer.surgery.verify import VerificationError, verify

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engines"
DTYPES = ("float32", "bfloat16", "int8")
REFUSALS = (UnsupportedError, VerificationError, ValueError)
#: form, engine, dtype
Key = tuple[str, str, str]


class Programs:
    """Both forms of a model in every engine, written when they are first asked for.

    Args:
        name: Of the SLAB model.
        options: Of the command line.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.images = torch.randn(8, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
        fused, _ = sf.fuse(trained_looking(name, options.size), self.images[:1])
        self.models = {SLAB: fused, BASELINE: baseline(name, options.size)}
        self.refused: dict[Key, str] = {}

    def keys(self) -> Iterator[tuple[str, Target, str]]:
        """Every form, engine and dtype that was not refused."""
        for form in self.models:
            for target, dtype in self.options.engines:
                if (form, target.name, dtype) not in self.refused:
                    yield form, target, dtype

    def folder(self, form: str, target: Target, dtype: str, batch_size: int) -> Path:
        """Where the program is, written if it was not there."""
        batch = "any" if target.any_batch else str(batch_size)
        parts = (self.name, self.options.size, form.split()[0], target.name, dtype, batch)
        folder: Path = self.options.programs / "-".join(map(str, parts))
        if not folder.exists():
            images = self.images[:batch_size]
            signature, flat = flatten(self.models[form], images, batch=target.any_batch)
            calibration = [[self.images]] if dtype == "int8" else []
            request = Request(flat=flat, signature=signature, inputs=[images], dtype=dtype, calibration=calibration)
            self.options.programs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.options.programs) as place:
                target.write(request, Path(place))
                shutil.copytree(place, folder)
        return folder

    def written(self, batch_size: int) -> list[tuple[Key, Target, Path]]:
        """All programs; what an engine refuses is left out, and why is kept."""
        found = []
        for form, target, dtype in list(self.keys()):
            key = (form, target.name, dtype)
            try:
                found.append((key, target, self.folder(form, target, dtype, batch_size)))
            except REFUSALS as error:
                self.refuse(key, error)
        return found

    def loaded(self, batch_size: int, threads: int) -> dict[Key, Callable[[], object]]:
        """Calls with a batch, each held against its model."""
        images, calls = self.images[:batch_size], dict[Key, Callable[[], object]]()
        for key, target, folder in self.written(batch_size):
            form, _, dtype = key
            signature, _ = flatten(self.models[form], images, batch=target.any_batch)
            try:
                program = Program(signature, target.load(folder, dtype, threads))
                verify(self.models[form], program, images, rtol=rtol_of(dtype), check_dtype=False, lazy=True)
            except REFUSALS as error:
                self.refuse(key, error)
            else:
                calls[key] = partial(program, images)
        return calls

    def refuse(self, key: Key, error: Exception) -> None:
        """Leave a program out from now on."""
        self.refused[key] = " ".join(str(error).split())
        print(f"{self.name}, {' '.join(key)}: {self.refused[key]}")


def times_of(calls: dict[Key, Callable[[], object]], seconds: float) -> dict[Key, list[tuple[float, float]]]:
    """CPU and wall seconds of each call, in turns, in an order drawn anew each round; the first two do not count."""
    times: dict[Key, list[tuple[float, float]]] = {key: [] for key in calls}
    order, began, rounds = list(calls), time.monotonic(), -2
    while rounds < 5 or time.monotonic() - began < seconds:
        random.shuffle(order)
        for key in order:
            before = time.process_time(), time.perf_counter()
            calls[key]()
            if rounds >= 0:
                times[key].append((time.process_time() - before[0], time.perf_counter() - before[1]))
        rounds += 1
    return times


@torch.no_grad()
def measure(programs: Programs, batch_size: int, threads: int) -> list[dict[str, Any]]:
    """One row a form, engine and dtype."""
    with num_threads(threads):
        times = times_of(programs.loaded(batch_size, threads), programs.options.seconds)
    medians = {key: [statistics.median(each) for each in zip(*pairs, strict=True)] for key, pairs in times.items()}
    clock = 0 if threads == 1 else 1
    rows = []
    for (form, engine, dtype), both in medians.items():
        rivals = {key[1]: other[clock] for key, other in medians.items() if (key[0], key[2]) == (BASELINE, dtype)}
        rival = min(rivals, key=rivals.__getitem__, default="")
        rows.append(
            {
                "model": programs.name,
                "batch_size": batch_size,
                "threads": threads,
                "form": form,
                "engine": engine,
                "dtype": dtype,
                "cpu_ms_per_image": round(1e3 * both[0] / batch_size, 3),
                "ms_per_image": round(1e3 * both[1] / batch_size, 3),
                "rounds": len(times[form, engine, dtype]),
                "best_baseline": rival,
                "over_best_baseline": round(rivals[rival] / both[clock], 3) if rivals else "",
            }
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["slab_deit_tiny", "slab_swin_tiny", "slab_pvt_tiny"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=224, help="height and width of images")
    parser.add_argument("--seconds", type=float, default=15.0, help="of measuring, for each model, batch and threads")
    parser.add_argument("--programs", type=Path, default=ROOT / "build" / "engines", help="folder that keeps them")
    parser.add_argument("--build", action="store_true", help="write the programs, measure nothing")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.engines, options.missing = [], []
    for name in options.targets:
        for dtype in options.dtypes:
            try:
                options.engines += [(target, dtype) for target in usable(name, dtype)[0]]
            except (ImportError, ValueError) as error:
                options.missing.append(f"{name} in {dtype}: {error}")
    return options


def main() -> None:
    options = parse()
    print("\n".join(options.missing))
    path = options.output / "engines.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    for name in options.models:
        settings = [(batch_size, threads) for batch_size in options.batch_sizes for threads in options.threads]
        if not options.build:
            settings = [each for each in settings if options.again or not _rows_of(rows, name, *each)]
        if not settings:
            continue
        # programs of Inductor are written for one number of threads by default
        with inductor_settings({"cpp.dynamic_threads": True}):
            programs = Programs(name, options)
            for batch_size in options.batch_sizes:
                programs.written(batch_size)
        for batch_size, threads in settings if not options.build else ():
            with num_threads(threads):
                machine = Machine.here(torch.device("cpu")).columns()
            found = [
                {key: str(value) for key, value in (row | machine).items()}
                for row in measure(programs, batch_size, threads)
            ]
            old = _rows_of(rows, name, batch_size, threads)
            rows = [row for row in rows if row not in old] + found
            write(path, rows)
            print(f"{name}, batch {batch_size}, threads {threads}: {len(found)} programs")
    if rows:
        (options.output / "engines.md").write_text(markdown(rows, options.missing), encoding="utf-8")
        draw(rows, options.output)
        if options.output == RESULTS:
            into_readme(rows, ROOT / "README.md")


def _rows_of(rows: list[dict[str, str]], name: str, batch_size: int, threads: int) -> list[dict[str, str]]:
    wanted = (name, str(batch_size), str(threads))
    return [row for row in rows if (row["model"], row["batch_size"], row["threads"]) == wanted]


if __name__ == "__main__":
    main()
