"""Files as `slab bench` writes them, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

from slabformer._files import write_csv
from slabformer.bench.report import BenchReport, columns
from slabformer.measure.rows import Measurement, Mode, Variant
from slabformer.measure.timing import Machine

MACHINE = Machine(device="abacus", threads=1, cores=2, load=0.0, versions={"torch": "9.9"}, command="slab", date="now")


def bench_file(
    folder: Path,
    model: str,
    speed: float = 12.0,
    *,
    baseline: bool = True,
    modes: tuple[Mode, ...] = ("eager", "compiled"),
    batch_sizes: tuple[int, ...] = (1, 8),
    machine: Machine = MACHINE,
) -> Path:
    """``folder/model/bench.csv``: compiled is twice as fast, the baseline slower by a sixth."""
    shares: dict[Variant, float] = {"fused": 1.0} | ({"LayerNorm baseline": 5 / 6} if baseline else {})
    rows = [
        _measurement(variant, mode, size, share * speed * (1 + (mode == "compiled")), 1.2 if baseline else None)
        for mode in modes
        for size in batch_sizes
        for variant, share in shares.items()
    ]
    path = folder / model / "bench.csv"
    path.parent.mkdir(parents=True)
    write_csv(path, BenchReport(model=model, machine=machine, measurements=rows).rows(), columns())
    return path


def _measurement(
    variant: Variant, mode: Mode, batch_size: int, speed: float, over_baseline: float | None
) -> Measurement:
    return Measurement(
        variant=variant, mode=mode, batch_size=batch_size, p50_ms=1.0, p90_ms=1.0, images_per_second=speed,
        memory_mib=None, parameters=1, macs=1, over_baseline=over_baseline, over_given=1.0, of_ceiling=None,
    )  # fmt: skip
