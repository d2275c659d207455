"""Training on the terminal: a progress bar, or plain lines where nobody watches."""

from __future__ import annotations

import time
from typing import Any, TextIO

from slabformer._extras import require
from slabformer.tasks.engine.observers import Observer, RunStart, StepReport

PLAIN_PHASE_SECONDS = 30.0


class ConsoleObserver(Observer):
    """Gamma, loss, learning rate, speed and time left in a bar; a line an epoch.

    Args:
        file: Where to write; standard error by default. Anything but a terminal gets plain lines.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._rich = require("rich.progress", extra="cli")
        self._console = require("rich.console", extra="cli").Console(file=file, stderr=file is None, highlight=False)
        self._bar: Any = None
        self._train_task: Any = None
        self._phase_task: Any = None
        self._loss = ""
        self._start: RunStart | None = None
        self._last_phase_line = 0.0

    def on_start(self, start: RunStart) -> None:
        """Say where training begins and open the bar."""
        self._start = start
        total = start.epochs * start.steps_per_epoch
        if start.step:
            self._console.print(f"going on from step {start.step} of {total} (epoch {start.epoch + 1})")
        if not self._console.is_terminal:
            return
        columns = self._rich
        self._bar = columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(),
            columns.MofNCompleteColumn(),
            columns.TextColumn("{task.fields[state]}"),
            columns.TimeRemainingColumn(),
            console=self._console,
        )
        self._train_task = self._bar.add_task("train", total=total, completed=start.step, state="")
        self._bar.start()

    def on_step(self, report: StepReport) -> None:
        """Move the bar; off a terminal, a line for every logged step."""
        if report.loss is not None:
            self._loss = f"loss {report.loss:.4f}  "
        state = f"{self._loss}gamma {report.gamma:.3f}  lr {report.lr:.2e}  {report.images_per_second:.0f} img/s"
        if self._bar is not None:
            self._bar.update(self._train_task, completed=report.step, state=state)
        elif report.loss is not None and self._start is not None:
            total = self._start.epochs * self._start.steps_per_epoch
            left = (total - report.step) * report.samples / max(report.images_per_second, 1e-9)
            self._console.print(
                f"epoch {report.epoch}/{self._start.epochs}  step {report.step}/{total}  {state}  {_clock(left)} left",
                soft_wrap=True,
            )

    def on_phase(self, name: str, done: int, total: int | None) -> None:
        """A second bar for evaluation and recalibration."""
        if self._bar is None:
            self._plain_phase(name, done, total)
            return
        if done == 0:
            if self._phase_task is not None:
                self._bar.remove_task(self._phase_task)
            self._phase_task = self._bar.add_task(name, total=total, state="")
        self._bar.update(self._phase_task, completed=done)
        if total is not None and done >= total:
            self._bar.remove_task(self._phase_task)
            self._phase_task = None

    def on_epoch(self, row: dict[str, float]) -> None:
        """One line with the epoch's figures."""
        scores = ("top1", "blend_top1", "ema_top1", "box_ap", "mask_ap", "blend_box_ap", "cosine", "blend_cosine")
        known = ("train_loss", "loss", *scores, "gamma")
        figures = "  ".join(f"{name} {row[name]:.4g}" for name in known if name in row)
        self._console.print(f"epoch {int(row['epoch'])}: {figures}", soft_wrap=True)

    def on_end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _plain_phase(self, name: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done == 0:
            self._last_phase_line = now
        elif now - self._last_phase_line > PLAIN_PHASE_SECONDS:
            self._last_phase_line = now
            self._console.print(f"{name}: batch {done}" + (f" of {total}" if total else ""))


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
