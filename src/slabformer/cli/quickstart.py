"""`slab quickstart`: the main job, with bars while it runs and one table at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace, set_parsing_settings
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from slabformer.cli.options import add_settings
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.quickstart.config import QuickstartConfig
from slabformer.tasks.engine.observers import Observer, RunStart, StepReport

if TYPE_CHECKING:
    from slabformer.quickstart.result import QuickstartResult

PLAIN_EVERY = 10


def parser() -> Parser:
    """The job's settings as options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = Parser(
        "slab quickstart",
        "Train a SLAB vision transformer and its LayerNorm baseline on scikit-learn's handwritten digits, recalibrate, "
        "fuse, verify and benchmark; about three minutes on two CPU cores.",
        ["slab quickstart", "slab quickstart --epochs 10 --no-compiled --output runs/quick"],
    )
    add_settings(made, QuickstartConfig)
    for group in (made.groups or {}).values():
        group.title = "settings"
    return made


def run(config: Namespace) -> Outcome:
    """Run the job; the path of its report is the last line."""
    from slabformer.quickstart.job import run_quickstart

    logging.getLogger("slabformer").setLevel(logging.WARNING)  # the bars and the table say it all
    console = Console()
    settings = QuickstartConfig(**vars(config))
    bars = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

    @contextmanager
    def stage(title: str) -> Iterator[Callable[[str], None]]:
        task = bars.add_task(title, total=None, state="")
        if not console.is_terminal:
            console.print(title)
        yield lambda text: bars.update(task, state=text)
        bars.update(task, total=1, completed=1, state="")

    with bars:
        result = run_quickstart(settings, observers=lambda model: [TrainingBar(bars, model)], stage=stage)
    report = Path(settings.output) / "report.html"
    return Outcome(data={**result.summary(), "report": report}, shown=[_table(result), f"report: {report}"])


class TrainingBar(Observer):
    """One bar a model; off a terminal, a line every few epochs."""

    def __init__(self, bars: Progress, model: str) -> None:
        self.bars, self.model = bars, model
        self._task: Any = None
        self._state = ""

    def on_start(self, start: RunStart) -> None:
        """Add the bar."""
        self._epochs = start.epochs
        self._task = self.bars.add_task(
            self.model, total=start.epochs * start.steps_per_epoch, completed=start.step, state=""
        )

    def on_step(self, report: StepReport) -> None:
        """Move it."""
        gamma = f"gamma {report.gamma:.2f}  " if self.model.startswith("slab") else ""
        self.bars.update(self._task, completed=report.step, state=f"{gamma}{self._state}")

    def on_epoch(self, row: dict[str, float]) -> None:
        """Show the epoch's accuracy."""
        self._state = f"loss {row['train_loss']:.3f}  accuracy {row.get('top1', float('nan')):.1%}"
        epoch = int(row["epoch"])
        if self.bars.disable and (epoch % PLAIN_EVERY == 0 or epoch == self._epochs):
            self.bars.console.print(f"{self.model}: epoch {epoch} of {self._epochs}  {self._state}", soft_wrap=True)


def _table(result: QuickstartResult) -> Table:
    summary = result.summary()
    table = Table(title="from LayerNorm to none", caption=f"{result.seconds:.0f} s on {result.bench.machine}")
    table.add_column("")
    for heading in ("SLAB, unfused", "SLAB, fused", "LayerNorm baseline"):
        table.add_column(heading, justify="right")
    slab, baseline = f"{summary['slab_accuracy']:.2%}", f"{summary['baseline_accuracy']:.2%}"
    table.add_row("test accuracy", f"{result.slab.metrics['top1']:.2%}", slab, baseline)
    total, folded = summary["norms_total"], summary["norms_folded"]
    table.add_row("norms computed", str(total), str(total - folded), str(total))
    table.add_row("difference of outputs", "-", f"{summary['fused_difference']:.1e}", "-")
    sizes = dict.fromkeys((row.batch_size, row.mode) for row in result.bench)
    for batch, mode in sizes:
        rows = [result.bench.find(variant, mode, batch) for variant in ("as given", "fused", "LayerNorm baseline")]
        table.add_row(
            f"images/s, batch {batch}, {mode}", *(f"{row.images_per_second:,.0f}" if row else "-" for row in rows)
        )
    return table
