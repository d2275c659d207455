"""The training loop: optimizer steps, schedules, EMA, checkpoints, evaluation. It knows no task."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.tasks.engine.devices import first_of_ranks, told_to_all
from slabformer.tasks.engine.diagnose import describe_nonfinite
from slabformer.tasks.engine.folder import refuse_difference
from slabformer.tasks.engine.nonfinite import (
    NonFiniteError,
    NonFiniteGuard,
    first_nonfinite_tensor,
)
from slabformer.tasks.engine.observers import Observer, RunStart, StepReport
from slabformer.tasks.engine.parts import Position, num_samples, windows
from slabformer.tasks.engine.signals import StoppedError, StopSignals
from slabformer.tasks.engine.state import capture, restore
from slabformer.tasks.engine.training import Training
from slabformer.tasks.engine.update import TOTAL, Update


@dataclass(kw_only=True, eq=False)
class Trainer(Training):
    """Trains a model, evaluates it, keeps checkpoints.

    Raises:
        NonFiniteError: Out of :meth:`fit`, if the loss, a gradient or a weight is NaN or infinite.
        DivergedError: Out of :meth:`fit`, if activations are far beyond what they were.
        StoppedError: Out of :meth:`fit`, after SIGTERM or SIGINT, when a checkpoint is written.
    """

    evaluate: Callable[[Trainer], dict[str, float]] | None = None
    """Metrics after an epoch; must leave the model and its modes as they were."""
    best_metric: str | None = None
    """Key of ``evaluate``'s metrics; a new highest one, once gamma is 0, is handed to ``on_best``."""
    on_best: Callable[[Trainer], None] | None = None
    """Called on the main process."""
    observers: Sequence[Observer] = ()
    """Told about everything, on the main process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        device = self.accelerator.device
        if not self.accelerator.is_main_process:
            self.observers = ()
        self.signals, self._guard, self._saved_step = StopSignals(), NonFiniteGuard(device), 0
        self._check_every = 1 if device.type == "cpu" else self.config.log_every
        self._update = Update(self.accelerator, self.model, self.optimizer, self._losses, self.config)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor | dict[str, Tensor]:
        """Of the task, with the alignment of fading norms beside them where the schedule weighs it."""
        losses = self.step_fn(model, batch)
        if self.gamma_schedule is None or self.gamma_schedule.align == 0:
            return losses
        parts = losses if isinstance(losses, dict) else {"task": losses}
        return {**parts, "alignment": self.gamma_schedule.alignment()}

    def resume(self) -> Path | None:
        """Go on from the newest undamaged checkpoint; None if there is none.

        Raises:
            ValueError: If its fingerprint differs.
            DamagedCheckpointError: If every checkpoint is damaged.
        """
        found = self.store.load_latest() if self.store is not None else None
        if found is None:
            return None
        path, state = found
        refuse_difference(state.get("fingerprint", {}), self.fingerprint, f"{path} belongs to another run")
        restore(self, state)
        self._saved_step = self.position.step
        return path

    def fit(self) -> None:
        """Train until the last epoch is done and evaluated; ``with trainer.signals:`` around it catches signals."""
        start = RunStart(
            epochs=self.config.epochs,
            steps_per_epoch=self.steps_per_epoch,
            epoch=self.position.epoch,
            step=self.position.step,
        )
        self._tell("on_start", start)
        while self.position.epoch < self.config.epochs:
            self._train_epoch()
            self.save()
            self._finish_epoch()
            self.meter.reset()
            self.position = Position(epoch=self.position.epoch + 1, step=self.position.step)
            self._stop_if_asked()

    def save(self) -> None:
        """Write a checkpoint of this position if there is none yet, unless training has gone wrong."""
        if self._saved_step == self.position.step:
            return
        self._raise_if_nonfinite()
        lost = first_of_ranks(first_nonfinite_tensor(self.model.state_dict()))
        if lost is not None:
            raise NonFiniteError(f"{lost} is not finite after step {self.position.step}; nothing was saved")
        state = capture(self)
        with told_to_all():
            if self.store is not None and self.accelerator.is_main_process:
                self.store.save(self.position.step, state)
        self._saved_step = self.position.step

    def progress(self, name: str, total: int | None) -> Callable[..., None]:
        """To be called after every batch of phase ``name``: tells observers; stops on a signal in a single process."""
        done = itertools.count(1)
        self._tell("on_phase", name, 0, total)

        def advance(*_: Any) -> None:
            self._tell("on_phase", name, next(done), total)
            if self.accelerator.num_processes == 1:  # several could not agree: they have different numbers of batches
                self._stop_if_asked()

        return advance

    def _train_epoch(self) -> None:
        position, config = self.position, self.config
        if position.batch >= self.batches_per_epoch:
            return
        self._update.train_step.train()
        self.loader.set_epoch(position.epoch)
        self.loader.set_start(position.batch)
        self.meter.restart_clock()
        for window in windows(self.loader, config.accumulate):
            gamma, lr = self.gamma, self.optimizer.param_groups[-1]["lr"]
            losses = self._optimizer_step(window)
            position.batch += len(window)
            position.step += 1
            self._report(window, losses, gamma, lr)
            self._stop_if_asked()
            if config.save_every and position.step % config.save_every == 0:
                self.save()

    def _optimizer_step(self, window: list[Any]) -> dict[str, Tensor]:
        """One update from the batches of ``window``; returns the mean loss over their samples, and its parts."""
        step = self.position.step
        losses, suspects = self._update.gradients(window, step)
        self._guard.observe(step, *suspects)
        if (step + 1) % self._check_every == 0:
            self._raise_if_nonfinite()
        self._update.apply()
        self._advance(step + 1)
        return losses

    def _advance(self, steps_done: int) -> None:
        if self.lr_schedule is not None:
            self.lr_schedule.step_update(steps_done)
        if self.gamma_schedule is not None:
            self.gamma_schedule.step(self._update.grad_norm)
        if self.ema is not None:
            self.ema.update(self.model, steps_done)

    def _report(self, window: list[Any], losses: dict[str, Tensor], gamma: float, lr: float) -> None:
        samples = sum(num_samples(batch) for batch in window)
        samples_of_all = samples * self.accelerator.num_processes
        self.meter.add(losses[TOTAL], samples, samples_of_all)
        step = self.position.step
        logged = step % self.config.log_every == 0
        means = self._read(losses) if logged else {}
        report = StepReport(
            epoch=self.position.epoch + 1,
            step=step,
            samples=samples_of_all,
            loss=means.pop(TOTAL, None),
            parts=means,
            gamma=gamma,
            lr=lr,
            images_per_second=self.meter.samples_per_second(),
            grad_norm=None if not logged or self._update.grad_norm is None else float(self._update.grad_norm),
        )
        self._tell("on_step", report)

    def _read(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Means over ranks; waits for the device, once for all of them."""
        means = self.accelerator.reduce(torch.stack([*losses.values()]), "mean").tolist()
        return dict(zip(losses, means, strict=True))

    def _finish_epoch(self) -> None:
        epoch, step = self.position.epoch, self.position.step
        row = {
            "epoch": epoch + 1,
            "step": step,
            "gamma": self.gamma,
            "lr": self.optimizer.param_groups[-1]["lr"],
            "train_loss": self.meter.mean_loss(self.accelerator),
            "images_per_second": self.meter.samples_per_second(),
        }
        due = (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs
        metrics = self.evaluate(self) if self.evaluate is not None and due else {}
        self._tell("on_epoch", {**row, **metrics})
        score = metrics.get(self.best_metric or "", -math.inf)
        if self.gamma == 0 and score > self.best:
            self.best = score
            if self.on_best is not None and self.accelerator.is_main_process:
                self.on_best(self)

    def _raise_if_nonfinite(self) -> None:
        step = self._guard.first_bad_step()
        if step is not None:
            raise NonFiniteError(describe_nonfinite(self, step))

    def _stop_if_asked(self) -> None:
        signum = self.signals.agreed()
        if signum:
            self.save()
            name = signal.Signals(signum).name
            raise StoppedError(
                f"stopped by {name} after step {self.position.step}; the same command goes on from there", signum
            )

    def _tell(self, event: str, *args: Any) -> None:
        for observer in self.observers:
            getattr(observer, event)(*args)
