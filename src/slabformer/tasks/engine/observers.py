"""Who wants to know how training goes: the interface, CSV files and TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slabformer._extras import require
from slabformer._files import errors_of, read_text, write_text

#: files of TensorBoard
EVENTS = "events.out.tfevents.*"
STEP_COLUMNS = ("epoch", "step", "loss", "gamma", "lr", "images_per_second")


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What an observer learns when training begins or goes on."""

    epochs: int
    """Epochs of the whole training."""
    steps_per_epoch: int
    """Optimizer steps in each."""
    epoch: int
    """Epochs done before, above 0 after a resume."""
    step: int
    """Optimizer steps done before."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What an observer learns after an optimizer step."""

    epoch: int
    """Epoch of the step, from 1."""
    step: int
    """Optimizer steps done, this one included."""
    samples: int
    """Samples of this step over all ranks."""
    loss: float | None
    """Mean over the step's samples; None between logged steps, to not wait for the device."""
    gamma: float
    """Share of LayerNorm the step ran with."""
    lr: float
    """Learning rate the step ran with."""
    images_per_second: float
    """Speed since the last logged step."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What ``loss`` is the sum of, if it has parts; empty between logged steps."""
    grad_norm: float | None = None
    """Of the step's gradient before it was clipped; None between logged steps."""


class Observer:
    """Base of all observers; override what is of interest. Only the main process calls them."""

    def on_start(self, start: RunStart) -> None:
        """Training begins or goes on."""

    def on_step(self, report: StepReport) -> None:
        """An optimizer step is done."""

    def on_phase(self, name: str, done: int, total: int | None) -> None:
        """Batch ``done`` of ``total`` of something that is not training, e.g. "evaluate", is done; 0 at its start."""

    def on_epoch(self, row: dict[str, float]) -> None:
        """An epoch and its evaluation are done; ``row`` is what the history keeps."""

    def on_end(self) -> None:
        """Training is over, also after an error."""


class CsvFile:
    """Rows that are appended, and cut back when training resumes before the last of them.

    Args:
        path: Of the file.
        columns: Its header; values that a row lacks are left empty.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def rows(self) -> list[dict[str, float]]:
        """All complete rows, without empty values.

        Raises:
            ValueError: If something other than numbers was written into the file.
        """
        if not self.path.exists():
            return []
        # a killed process leaves half a line
        lines = [line for line in read_text(self.path).splitlines(keepends=True) if line.endswith("\n")]
        rows = [row for row in csv.DictReader(lines) if None not in row.values()]
        try:
            return [{name: float(value) for name, value in row.items() if value} for row in rows]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path} was altered, it holds other things than numbers: {error}") from error

    def cut(self, column: str, below: float) -> None:
        """Keep the rows whose ``column`` is below ``below``."""
        kept = [row for row in self.rows() if row[column] < below]
        write_text(self.path, self._format([dict(zip(self.columns, self.columns, strict=True)), *kept]))

    def append(self, row: dict[str, float]) -> None:
        """Add ``row`` in one write.

        Raises:
            OSError: If the disk is full or the file cannot be written to.
        """
        with errors_of(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._format([row]))

    def _format(self, rows: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
        return text.getvalue()


def _short(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value


class CsvObserver(Observer):
    """``metrics.csv``, a row an epoch, and ``steps.csv``, a row a logged step.

    Args:
        folder: Of the run.
        columns: Of ``metrics.csv``.
        parts: Names of what the loss is the sum of.
    """

    def __init__(self, folder: Path, columns: Sequence[str], parts: Sequence[str] = ()) -> None:
        self.epochs = CsvFile(folder / "metrics.csv", columns)
        self.steps = CsvFile(folder / "steps.csv", [*STEP_COLUMNS, *parts])

    def on_start(self, start: RunStart) -> None:
        """Drop the rows that will be written again."""
        self.epochs.cut("epoch", start.epoch + 1)
        self.steps.cut("step", start.step + 1)

    def on_step(self, report: StepReport) -> None:
        """A row if the step was logged."""
        if report.loss is not None:
            self.steps.append({**vars(report), **report.parts})

    def on_epoch(self, row: dict[str, float]) -> None:
        """A row."""
        self.epochs.append(row)


def event_writer(folder: Path, record: Callable[[str], None], step: int) -> Any:
    """A ``SummaryWriter`` of TensorBoard's whose new file in ``folder`` is told to ``record``; events after ``step``,
    from which a run goes on, are hidden."""
    require("tensorboard", extra="train")
    writer = require("torch.utils.tensorboard", extra="train").SummaryWriter
    before = set(folder.glob(EVENTS))
    made = writer(str(folder), purge_step=step + 1 if step else None)
    for path in set(folder.glob(EVENTS)) - before:
        record(path.name)
    return made


class TensorBoardObserver(Observer):
    """TensorBoard events in a folder.

    Args:
        folder: Of the run.
        record: Told the name of the file that is made.
    """

    def __init__(self, folder: Path, record: Callable[[str], None]) -> None:
        self.folder, self._record = folder, record
        self._writer: Any = None

    def on_start(self, start: RunStart) -> None:
        """Open the events; those after the resumed step are hidden by TensorBoard."""
        self._writer = event_writer(self.folder, self._record, start.step)

    def on_step(self, report: StepReport) -> None:
        """Loss, gamma, rate and speed of a logged step."""
        if report.loss is not None:
            for name in ("loss", "gamma", "lr", "images_per_second"):
                self._writer.add_scalar(f"train/{name}", getattr(report, name), report.step)
            for name, part in report.parts.items():
                self._writer.add_scalar(f"train/{name}", part, report.step)

    def on_epoch(self, row: dict[str, float]) -> None:
        """Everything in the history's row."""
        for name in row.keys() - {"epoch", "step"}:
            self._writer.add_scalar(f"epoch/{name}", row[name], int(row["step"]))
        self._writer.flush()

    def on_end(self) -> None:
        """Close the events."""
        if self._writer is not None:
            self._writer.close()
