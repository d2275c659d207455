"""`slab report`: accuracy against speed of the models that `slab bench` measured."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.table import Table

from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingPath, FigureToWrite, NonEmptyStr, PositiveInt

if TYPE_CHECKING:
    from slabformer.figures.comparison import Comparison

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Options of `slab report`."""
    from slabformer.measure.rows import Mode

    made = Parser(
        "slab report",
        "Accuracy against images per second, an arrow from each LayerNorm baseline to its fused model. Speeds come "
        "from the CSV files of `slab bench`, accuracies are the published ones, and marked so, or those you give.",
        [
            "slab bench slab_deit_tiny --output speeds/slab_deit_tiny",
            "slab report speeds --output accuracy_over_speed.png",
            "slab report speeds --accuracy slab_deit_tiny=74.1 --mode eager --batch-size 1",
        ],
    )
    made.add_argument("benchmarks", type=ExistingPath, nargs="+", help="bench.csv files, or folders that hold some")
    made.add_argument(
        "--accuracy", type=NonEmptyStr, nargs="+", default=[], metavar="NAME=PERCENT", help="measured top-1"
    )
    made.add_argument("--mode", type=Mode | None, help="by default compiled where every model was compiled")
    made.add_argument(
        "--batch-size", type=PositiveInt | None, help="by default the largest that every model was measured at"
    )
    made.add_argument("--output", type=FigureToWrite, default=Path("report.png"), help="the figure")
    return made


def run(config: Namespace) -> Outcome:
    """Read and draw.

    Raises:
        ValueError: If the files do not go together, or no model's accuracy is known.
    """
    from slabformer.figures.comparison import compare_files
    from slabformer.figures.comparison_picture import accuracy_over_speed
    from slabformer.figures.plots import save

    path = config.output
    comparison = compare_files(
        config.benchmarks,
        mode=config.mode,
        batch_size=config.batch_size,
        accuracy=dict(map(_accuracy, config.accuracy)),
    )
    points = [point for pair in comparison.pairs for point in pair.points()]
    left_out = sorted({point.model for point in points if point.top1 is None})
    if len(left_out) == len({point.model for point in points}):
        raise ValueError(f"no accuracy is known of {', '.join(left_out)}; give measured ones: --accuracy NAME=PERCENT")
    if left_out:
        logger.warning("no accuracy is known of %s: not drawn; --accuracy NAME=PERCENT gives one", ", ".join(left_out))
    save(accuracy_over_speed(comparison), path)
    return Outcome(data=asdict(comparison), shown=[_table(comparison)], files=[path])


def _accuracy(given: str) -> tuple[str, float]:
    name, _, percent = given.rpartition("=")
    try:
        value = float(percent)
    except ValueError:
        value = -1.0
    if not name or not 0 <= value <= 100:
        raise ValueError(f"--accuracy takes NAME=PERCENT with a percentage from 0 to 100, got {given!r}")
    return name, value


def _table(comparison: Comparison) -> Table:
    table = Table(title=f"{comparison.mode}, batch {comparison.batch_size}", caption=comparison.where)
    for heading in ("model", "images/s", "x baseline", "top-1 %", "accuracy"):
        table.add_column(heading, justify="left" if heading in ("model", "accuracy") else "right")
    for pair in comparison.pairs:
        for point in pair.points():
            gain = pair.over_baseline if point is pair.fused else None
            table.add_row(
                point.model,
                f"{point.images_per_second:,.1f}",
                "-" if gain is None else f"{gain:.2f}",
                "-" if point.top1 is None else f"{point.top1:.1f}",
                point.source or "unknown",
                end_section=point is pair.fused,
            )
    return table
