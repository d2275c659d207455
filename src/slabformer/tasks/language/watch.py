"""Callbacks of a run: its CSV files, the terminal, and signals that end it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slabformer._extras import require
from slabformer.tasks.engine.devices import told_to_all
from slabformer.tasks.engine.observers import CsvFile
from slabformer.tasks.engine.signals import StoppedError, StopSignals

STEP_COLUMNS = ("step", "loss", "gamma", "lr", "tokens_per_second")
METRIC_COLUMNS = ("step", "gamma", "perplexity", "loss", "blend_perplexity", "blend_loss")


class RecordCallback(TrainerCallback):
    """``steps.csv``, a row a logged step, ``metrics.csv``, a row an evaluation, and the same on the terminal.

    Args:
        folder: Of the two files.
        tokens_per_step: Over all processes.
        file: Terminal, or where plain lines go; standard error by default.
    """

    def __init__(self, folder: Path, tokens_per_step: int, file: TextIO | None = None) -> None:
        self.steps, self.metrics = (
            CsvFile(folder / "steps.csv", STEP_COLUMNS),
            CsvFile(folder / "metrics.csv", METRIC_COLUMNS),
        )
        self.tokens_per_step = tokens_per_step
        self._rich = require("rich.progress", extra="cli")
        self._console = require("rich.console", extra="cli").Console(file=file, stderr=file is None, highlight=False)
        self._bar: Any = None
        self._task: Any = None
        self._last = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the rows that will be written again, and open the bar."""
        self._last = (state.global_step, time.perf_counter())
        with told_to_all():
            if state.is_world_process_zero:
                for file in (self.steps, self.metrics):
                    file.cut("step", state.global_step + 1)
        if not state.is_world_process_zero:
            return
        if state.global_step:
            self._console.print(f"going on from step {state.global_step} of {state.max_steps}")
        if self._console.is_terminal:
            parts = self._rich
            columns = (parts.TextColumn("train"), parts.BarColumn(), parts.MofNCompleteColumn())
            text = parts.TextColumn("{task.fields[state]}")
            self._bar = parts.Progress(*columns, text, parts.TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, state="")
            self._bar.start()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """A row and a line for a logged step."""
        if "learning_rate" not in (logs or {}):
            return
        now, step = time.perf_counter(), state.global_step
        speed = (step - self._last[0]) * self.tokens_per_step / max(now - self._last[1], 1e-9)
        self._last = (step, now)
        row = {"step": step, "loss": logs["loss"], "lr": logs["learning_rate"], "tokens_per_second": speed}
        with told_to_all():
            if state.is_world_process_zero:
                self.steps.append(row | {name: logs[name] for name in ("gamma",) if name in logs})
        if not state.is_world_process_zero:
            return
        gamma = f"  gamma {logs['gamma']:.3f}" if "gamma" in logs else ""
        line = f"loss {row['loss']:.4f}{gamma}  lr {row['lr']:.2e}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=line)
        else:
            self._console.print(f"step {step}/{state.max_steps}  {line}", soft_wrap=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """A row and a line for an evaluation, whose time does not count for the speed."""
        self._last = (state.global_step, time.perf_counter())
        gamma = {name: state.log_history[-1][name] for name in ("gamma",) if name in state.log_history[-1]}
        with told_to_all():
            if state.is_world_process_zero:
                self.metrics.append({"step": state.global_step, **gamma, **metrics})
        if state.is_world_process_zero:
            figures = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
            self._console.print(f"step {state.global_step}: {figures}", soft_wrap=True)

    def close(self) -> None:
        """Close the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class SignalCallback(TrainerCallback):
    """After SIGTERM or SIGINT: finish the step, write a checkpoint, stop.

    Args:
        signals: Active while training.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._received = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and an end."""
        self._received = self.signals.agreed()
        if self._received:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so, if a signal ended training.

        Raises:
            StoppedError: Then.
        """
        if self._received:
            raise stopped(self._received, state.global_step)


def stopped(signum: int, step: int) -> StoppedError:
    """What says that signal ``signum`` ended a run whose checkpoint is of ``step``."""
    name = signal.Signals(signum).name
    return StoppedError(f"stopped by {name} after step {step}; the same command goes on from there", signum)
