"""What happens between the steps of ``mindspore.train.Model``: rates, gamma, checkpoints, evaluation, signals."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slabformer.mindspore.callbacks import ProgressiveCallback
from slabformer.mindspore.cells import prepbn_cells
from slabformer.mindspore.runtime import require
from slabformer.mindspore.training.state import Parts, capture, copy_statistics
from slabformer.progressive import Guard, ProgressiveSchedule
from slabformer.tasks.classification.config import TrainConfig
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.ema import decay_at
from slabformer.tasks.engine.nonfinite import NonFiniteError, first_nonfinite_tensor
from slabformer.tasks.engine.observers import Observer, RunStart, StepReport
from slabformer.tasks.engine.parts import Position
from slabformer.tasks.engine.signals import StoppedError, StopSignals

if TYPE_CHECKING:
    from mindspore.train import Callback
else:
    Callback = require().train.Callback


class ScheduleCallback(ProgressiveCallback):
    """A :class:`ProgressiveCallback` that follows torch's schedule, which staggers norms and waits for explosions.

    Args:
        schedule: Of the torch model whose norms have the names of the cells.
        parts: The training; its torch model is given the running statistics where the schedule looks at them.
    """

    def __init__(self, schedule: ProgressiveSchedule, parts: Parts) -> None:
        super().__init__(schedule.total_steps)
        self.schedule, self.parts, self._looks_every = schedule, parts, Guard().every
        self._norms = {norm.gamma.name.removesuffix(".gamma"): norm for norm in prepbn_cells(parts.cell)}
        for norm in self._norms.values():
            norm.rep.warm_statistics = schedule.warm_statistics

    def on_train_begin(self, run_context: Any) -> None:
        """Write gamma."""
        self._write()

    def on_train_step_begin(self, run_context: Any) -> None:
        """Write gamma."""
        self._write()

    def on_train_step_end(self, run_context: Any) -> None:
        """Move on by one step."""
        if self.schedule.steps_done % self._looks_every == self._looks_every - 1:
            copy_statistics(self.parts)
        self.schedule.step(float(run_context.original_args().net_outputs[1].asnumpy()))

    def on_train_end(self, run_context: Any) -> None:
        """Write the gamma of the step to come."""
        self._write()

    def _write(self) -> None:
        for name, gamma in self.schedule.gammas.items():
            self._norms[name].set_gamma(gamma)


class RunCallback(Callback):
    """Rates before a step, reports and checkpoints after it, evaluation after an epoch.

    Args:
        config: The recipe.
        parts: The training.
        store: Where checkpoints go; None on all processes but the first.
        signals: Noted by the caller.
        observers: Told how training goes.
        evaluate: Metrics after an epoch.
        on_best: Called where top-1 is a new highest one, once gamma is 0.
        steps_per_epoch: Of this process.
        processes: That train.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        store: CheckpointStore | None,
        signals: StopSignals,
        observers: Sequence[Observer],
        evaluate: Callable[[], dict[str, float]],
        on_best: Callable[[], None],
        *,
        epochs: int,
        steps_per_epoch: int,
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.config, self.parts, self.store, self.signals, self.observers = config, parts, store, signals, observers
        self.evaluate, self.on_best = evaluate, on_best
        self.epochs, self.steps_per_epoch, self.processes = epochs, steps_per_epoch, processes
        self._saved_step = parts.position.step
        self._clock, self._samples = time.perf_counter(), 0
        self._ran_with = (1.0, 0.0)

    def announce(self) -> None:
        """Say where training begins."""
        position = self.parts.position
        start = RunStart(
            epochs=self.epochs, steps_per_epoch=self.steps_per_epoch, epoch=position.epoch, step=position.step
        )
        self.tell("on_start", start)

    def on_train_epoch_begin(self, run_context: Any) -> None:
        """Speed is measured from here on."""
        self._clock, self._samples = time.perf_counter(), 0

    def on_train_step_begin(self, run_context: Any) -> None:
        """Write the rates, and the decay of the average."""
        parts = self.parts
        self._ran_with = (parts.gamma, parts.rate)
        for stored, group in zip(parts.step.optimizer.rates, parts.optimizer.param_groups, strict=True):
            stored.set_data(require().Tensor(group["lr"], dtype=stored.dtype))
        if parts.step.average is not None:
            decay = decay_at(parts.position.step + 1, self.config.ema.decay, self.config.ema.warmup)
            parts.step.average.decay.set_data(require().Tensor(decay, dtype=parts.step.average.decay.dtype))

    def on_train_step_end(self, run_context: Any) -> None:
        """Check, count, report, and save where it is time."""
        given, position = run_context.original_args(), self.parts.position
        loss, norm, step = (output.asnumpy() for output in given.net_outputs)
        assert int(step) == position.step, f"MindSpore handed out batch {int(step)} in step {position.step}"
        self._refuse_nonfinite(float(loss), float(norm))
        samples = len(given.train_dataset_element[0]) * self.processes
        position.step, position.batch = position.step + 1, position.batch + 1
        self._samples += samples
        self.parts.loss_sum += float(loss)
        self.parts.lr_schedule.step_update(position.step)
        logged = position.step % self.config.log_every == 0
        gamma, rate = self._ran_with
        report = StepReport(
            epoch=position.epoch + 1,
            step=position.step,
            samples=samples,
            loss=float(loss) if logged else None,
            gamma=gamma,
            lr=rate,
            images_per_second=self._speed(),
            grad_norm=float(norm) if logged else None,
        )
        self.tell("on_step", report)
        self.stop_if_asked()
        if self.config.save_every and position.step % self.config.save_every == 0:
            self.save()

    def on_train_epoch_end(self, run_context: Any) -> None:
        """Save, evaluate, and go on to the next epoch."""
        parts, position = self.parts, self.parts.position
        self.save()
        row = {
            "epoch": position.epoch + 1,
            "step": position.step,
            "gamma": parts.gamma,
            "lr": parts.rate,
            "train_loss": parts.loss_sum / self.steps_per_epoch,
            "images_per_second": self._speed(),
        }
        due = (position.epoch + 1) % self.config.eval_every == 0 or position.epoch + 1 == self.epochs
        metrics = self.evaluate() if due else {}
        self.tell("on_epoch", {**row, **metrics})
        if parts.gamma == 0 and metrics.get("top1", -1.0) > parts.best:
            parts.best = metrics["top1"]
            self.on_best()
        parts.position, parts.loss_sum = Position(epoch=position.epoch + 1, step=position.step), 0.0
        self.stop_if_asked()

    def save(self) -> None:
        """Write a checkpoint of this position if there is none yet.

        Raises:
            NonFiniteError: If a weight is NaN or infinite.
        """
        step = self.parts.position.step
        if self._saved_step == step:
            return
        state = capture(self.parts)
        lost = first_nonfinite_tensor(state["model"])
        if lost is not None:
            raise NonFiniteError(f"{lost} is not finite after step {step}; nothing was saved")
        if self.store is not None:
            self.store.save(step, state)
        self._saved_step = step

    def stop_if_asked(self) -> None:
        """End training after a signal, with everything saved.

        Raises:
            StoppedError: If there was one.
        """
        signum = self.signals.agreed()
        if signum:
            self.save()
            name, step = signal.Signals(signum).name, self.parts.position.step
            raise StoppedError(f"stopped by {name} after step {step}; the same command goes on from there", signum)

    def tell(self, event: str, *args: Any) -> None:
        """Hand an event to all observers."""
        for observer in self.observers:
            getattr(observer, event)(*args)

    def _speed(self) -> float:
        return self._samples / max(time.perf_counter() - self._clock, 1e-9)

    def _refuse_nonfinite(self, loss: float, norm: float) -> None:
        found = [name for name, value in (("loss", loss), ("gradient", norm)) if not math.isfinite(value)]
        if found:
            raise NonFiniteError(
                f"the {found[0]} is not finite in step {self.parts.position.step + 1}; lower the learning rate, or "
                "clip the gradient; the last checkpoint stays"
            )
