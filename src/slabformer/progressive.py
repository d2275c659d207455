"""The schedule that fades LayerNorm out: gamma from 1 to 0 over a fraction of training."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from slabformer.nn.controls import prepbn_modules
from slabformer.nn.prepbn import Phase, PRepBN
from slabformer.settings import (
    FractionBelowOne,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    check_fractions,
    checked,
)

logger = logging.getLogger(__name__)

Shape = Literal["linear", "cosine"]
#: gammas as near as this are the same, whatever dtype stored them
_SAME = 1e-2


class ProgressiveSchedule:
    """Writes gamma into every PRepBN of a model after each optimizer step (Guo et al. 2024, section 4.1, eq. 4).

    Step ``t`` of ``total_steps`` runs with gamma 1 for the first ``warmup`` of training; then gamma falls over ``fade``
    of training, linearly ``1 - (t - t0) / T`` as published or by a half cosine, and is 0 from there on. Steps are
    optimizer steps: gradient accumulation, activation checkpointing and evaluation do not move it, nothing is read
    back from a device.

    Gamma never rises. On a model that has begun to fade, the schedule goes on from the model's gamma and logs a warning
    that says so; norms that have faded stay so. To fade again from 1, call ``set_gamma(1)`` on the norms first.

    Args:
        model: Holds the PRepBN modules; convert and build the optimizer first.
        total_steps: Optimizer steps of the whole training.
        warmup: Fraction of training with gamma 1 before fading starts.
        fade: Fraction of training over which gamma falls; the published models range from 0.08 to 0.80.
        shape: "linear" as published, or "cosine".
        warm_statistics: Let RepBN's statistics follow the data from the first step, also while gamma is 1, and average
            the first batches alike, so that they do not start from (0, 1). False is the published rule: statistics
            stand still while gamma is held at 1, then move by momentum alone.
        optimizer: One or several, checked to hold the parameters of the norms. Without it, those that step before the
            first ``step()`` and hold parameters of the model are looked at instead.
        start: Optimizer steps done already, in a training that goes on; gamma is that of the step to come.

    Raises:
        ValueError: If the model has no PRepBN, a fraction is out of range, the schedule ends after training does, the
            norms are at different gammas above 0, or the optimizer was built before the norms were converted.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        total_steps: PositiveInt,
        warmup: FractionBelowOne = 0.0,
        fade: PositiveFraction = 0.8,
        shape: Shape = "linear",
        warm_statistics: bool = True,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        start: NonNegativeInt = 0,
    ) -> None:
        self._norms = prepbn_modules(model)
        if not self._norms:
            raise ValueError("the model has no PRepBN to fade; call convert_norms_(model) first")
        check_fractions(warmup, fade)
        self.total_steps, self.shape, self.warm_statistics = total_steps, shape, warm_statistics
        self.warmup_steps = min(round(warmup * total_steps), total_steps - 1)
        self.fade_steps = min(max(1, round(fade * total_steps)), total_steps - self.warmup_steps)
        self._step = start
        goes_on = self._go_on()
        self._watch: _OptimizerWatch | None = _OptimizerWatch(self._norms, model)
        if optimizer is not None:
            for one in [optimizer] if isinstance(optimizer, Optimizer) else optimizer:
                self._watch.saw(one)
            self._check_optimizers()
        self._write(gamma=not goes_on)

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
        if self._watch is not None and self._watch.has_seen:
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
            ValueError: If a key is missing or unknown, or the model has faded further than the state; the schedule is
                then unchanged.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"not a ProgressiveSchedule state: {sorted(state)} instead of {sorted(self.state_dict())}")
        before = self.state_dict()
        self._restore(state)
        gamma = _gamma_of(self._norms.values())
        if gamma is not None and self._is_behind(gamma):
            wanted = self.gamma
            self._restore(before)
            raise ValueError(
                f"the state is at gamma {wanted:.3g}, but the model has faded to {gamma:.3g}; "
                "load the model's weights of that step first"
            )
        self._write()

    def _restore(self, state: dict[str, Any]) -> None:
        settings = dict(state)
        self._step = settings.pop("step")
        self.__dict__.update(settings)

    def _go_on(self) -> bool:
        """Move to where the model's gamma stands, if it has faded further than this schedule."""
        gamma = _gamma_of(self._norms.values())
        if gamma is None or not self._is_behind(gamma):
            return False
        self._step = self._step_at(gamma)
        logger.warning(
            "the model has begun to fade before: the schedule goes on from its gamma of %.3g, at step %d; "
            "call set_gamma(1) on its norms first to fade again from 1",
            *(gamma, self._step),
        )
        return True

    def _is_behind(self, gamma: float) -> bool:
        slack = _SAME if self.gamma < 1 else 0
        return gamma < self.gamma - slack or (gamma == 0 and not self.finished)

    def _step_at(self, gamma: float) -> int:
        """First step whose gamma is not above ``gamma``; fading has an end only where that is 0."""
        if gamma == 0:
            return self.warmup_steps + self.fade_steps
        done = 1 - gamma if self.shape == "linear" else math.acos(2 * gamma - 1) / math.pi
        return self.warmup_steps + min(math.ceil(done * self.fade_steps - 0.05), self.fade_steps - 1)  # float32 rounds

    def _write(self, gamma: bool = True) -> None:
        share, phase = self.gamma, self.phase
        for norm in self._norms.values():
            if gamma and (share == 0 or norm.known_phase != "done"):  # what was converted and faded earlier stays so
                norm.set_gamma(share, phase)
            norm.rep.warm_statistics = self.warm_statistics

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": self._watch is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch = _OptimizerWatch(self._norms) if state["_watch"] else None

    def _check_optimizers(self) -> None:
        assert self._watch is not None
        missing = self._watch.missing()
        self._watch.close()
        self._watch = None
        if missing:
            raise ValueError(
                f"the optimizer does not hold {len(missing)} parameters of the norms (first: {missing[0]}); "
                "build it after convert_norms_, or pass optimizer=[...] if several take turns"
            )


def _gamma_of(norms: Iterable[PRepBN]) -> float | None:
    """Share of the old norm in those that still hold it; 0 where none does, None on the meta device.

    Raises:
        ValueError: If they are at different ones.
    """
    norms = list(norms)
    if any(norm.gamma.is_meta for norm in norms):
        return None
    gammas = [1.0 if norm.phase == "warm" else float(norm.gamma) for norm in norms if norm.phase != "done"] or [0.0]
    lowest, highest = min(gammas), max(gammas)
    if highest - lowest > _SAME:
        raise ValueError(
            f"the norms are at different gammas, {lowest:.3g} to {highest:.3g}, which one schedule cannot fade; "
            "bring them to one with set_gamma"
        )
    return min(max(lowest, 0.0), 1.0)


class _OptimizerWatch:
    """Notes which parameters the optimizers of a model step, until closed or forgotten.

    Args:
        norms: Whose parameters must be held.
        model: Optimizers that hold none of its parameters are somebody else's; the norms alone by default.
    """

    def __init__(self, norms: dict[str, PRepBN], model: nn.Module | None = None) -> None:
        self.has_seen = False
        self._norms = norms
        self._model = None if model is None else weakref.ref(model)
        self._seen: set[nn.Parameter] = set()
        this = weakref.ref(self)

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (watch := this()) is not None and watch.concerns(optimizer):
                watch.saw(optimizer)

        self._handle = register_optimizer_step_post_hook(note)
        weakref.finalize(self, self._handle.remove)

    def concerns(self, optimizer: Optimizer) -> bool:
        model = None if self._model is None else self._model()
        modules = self._norms.values() if model is None else [model]
        own = {parameter for module in modules for parameter in module.parameters()}
        return not own.isdisjoint(_parameters_of(optimizer))

    def saw(self, optimizer: Optimizer) -> None:
        self.has_seen = True
        self._seen.update(_parameters_of(optimizer))

    def missing(self) -> list[str]:
        """Names of the parameters of the norms that train and no optimizer holds."""
        return [
            f"{name}.{leaf}"
            for name, norm in self._norms.items()
            for leaf, parameter in norm.named_parameters()
            if parameter.requires_grad and parameter not in self._seen
        ]

    def close(self) -> None:
        self._handle.remove()


def _parameters_of(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
