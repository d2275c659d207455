"""The schedule that fades LayerNorm out: gamma from 1 to 0 over a fraction of training."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from slabformer.nn.controls import prepbn_modules
from slabformer.nn.prepbn import Phase

Shape = Literal["linear", "cosine"]


class ProgressiveSchedule:
    """Writes gamma into every PRepBN of a model after each optimizer step (Guo et al. 2024, section 4.1, eq. 4).

    Step ``t`` of ``total_steps`` runs with gamma 1 for the first ``warmup`` of training; then gamma falls over ``fade``
    of training, linearly ``1 - (t - t0) / T`` as published or by a half cosine, and is 0 from there on. Steps are
    optimizer steps: gradient accumulation, activation checkpointing and evaluation do not move it, nothing is read
    back from a device.

    Args:
        model: Holds the PRepBN modules; convert and build the optimizer first.
        total_steps: Optimizer steps of the whole training.
        warmup: Fraction of training with gamma 1 before fading starts.
        fade: Fraction of training over which gamma falls; the published models range from 0.08 to 0.80.
        shape: "linear" as published, or "cosine".
        warm_statistics: Let RepBN's statistics follow the data from the first step, also while gamma is 1, and average
            the first batches alike, so that they do not start from (0, 1). False is the published rule: statistics
            stand still while gamma is held at 1, then move by momentum alone.
        optimizer: Checked to hold the parameters of the norms. Without it, every optimizer that steps before the first
            ``step()`` is looked at instead.

    Raises:
        ValueError: If the model has no PRepBN, a fraction is out of range, the schedule ends after training does, or
            the optimizer was built before the norms were converted.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        warmup: float = 0.0,
        fade: float = 0.8,
        shape: Shape = "linear",
        warm_statistics: bool = True,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._norms = prepbn_modules(model)
        if not self._norms:
            raise ValueError("the model has no PRepBN to fade; call convert_norms_(model) first")
        if total_steps < 1 or total_steps != int(total_steps):
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps}")
        check_fractions(warmup, fade)
        if shape not in ("linear", "cosine"):
            raise ValueError(f"shape must be 'linear' or 'cosine', got {shape!r}")
        self.total_steps, self.shape, self.warm_statistics = total_steps, shape, warm_statistics
        self.warmup_steps = min(round(warmup * total_steps), total_steps - 1)
        self.fade_steps = min(max(1, round(fade * total_steps)), total_steps - self.warmup_steps)
        self._step = 0
        self._watch: _OptimizerWatch | None = _OptimizerWatch(self._norms)
        if optimizer is not None:
            self._watch.saw(optimizer)
            self._check_optimizers()
        self._write()

    @property
    def gamma(self) -> float:
        """Share of the old norm in the step to come."""
        if self._step < self.warmup_steps:
            return 1.0
        done = min((self._step - self.warmup_steps) / self.fade_steps, 1.0)
        return 1.0 - done if self.shape == "linear" else 0.5 + 0.5 * math.cos(math.pi * done) if done < 1 else 0.0

    @property
    def phase(self) -> Phase:
        """Which branches the step to come computes."""
        if self._step < self.warmup_steps:
            return "warm"
        return "fading" if self._step < self.warmup_steps + self.fade_steps else "done"

    @property
    def finished(self) -> bool:
        """Whether gamma has reached 0, so that nothing of the old norm is computed any more."""
        return self.phase == "done"

    def step(self) -> None:
        """Move on by one optimizer step; call it once after every ``optimizer.step()``."""
        if self._watch is not None and self._watch.seen:
            self._check_optimizers()
        self._step += 1
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, and its settings, as plain values."""
        return {
            "step": self._step,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "fade_steps": self.fade_steps,
            "shape": self.shape,
            "warm_statistics": self.warm_statistics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``: step and settings are taken from it, gamma is written into the norms.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"not a ProgressiveSchedule state: {sorted(state)} instead of {sorted(self.state_dict())}")
        settings = dict(state)
        self._step = settings.pop("step")
        self.__dict__.update(settings)
        self._write()

    def _write(self) -> None:
        gamma, phase = self.gamma, self.phase
        for norm in self._norms.values():
            norm.set_gamma(gamma, phase)
            norm.rep.warm_statistics = self.warm_statistics

    def _check_optimizers(self) -> None:
        assert self._watch is not None
        missing = self._watch.missing()
        self._watch.close()
        self._watch = None
        if missing:
            raise ValueError(
                f"the optimizer does not hold {len(missing)} parameters of the norms (first: {missing[0]}); "
                "build it after convert_norms_"
            )


class _OptimizerWatch:
    """Notes which parameters the optimizers of this process step, until closed or forgotten."""

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        self.seen: set[int] = set()
        self._wanted = {
            f"{name}.{leaf}": parameter
            for name, norm in norms.items()
            for leaf, parameter in norm.named_parameters()
            if parameter.requires_grad
        }
        self._ids = {id(parameter) for parameter in self._wanted.values()}
        this = weakref.ref(self)

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (watch := this()) is not None:
                watch.saw(optimizer)

        self._handle = register_optimizer_step_post_hook(note)
        weakref.finalize(self, self._handle.remove)

    def saw(self, optimizer: Optimizer) -> None:
        self.seen.update(id(p) for group in optimizer.param_groups for p in group["params"])

    def missing(self) -> list[str]:
        return [name for name, parameter in self._wanted.items() if id(parameter) not in self.seen]

    def close(self) -> None:
        self._handle.remove()


def check_fractions(warmup: float, fade: float) -> None:
    """Of training, before LayerNorm starts to fade and while it does.

    Raises:
        ValueError: If one is out of range, or LayerNorm would not be gone when training ends.
    """
    if not (warmup >= 0 and fade > 0):
        raise ValueError(f"warmup must be at least 0 and fade above 0, got warmup={warmup}, fade={fade}")
    if warmup + fade > 1 + 1e-9:
        raise ValueError(
            f"the schedule would end after training: warmup {warmup} + fade {fade} is above 1; LayerNorm would stay"
        )
