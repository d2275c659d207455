"""The schedule that fades LayerNorm out: gamma from 1 to 0 over a fraction of training."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slabformer.nn.controls import prepbn_modules
from slabformer.nn.prepbn import Phase, PRepBN
from slabformer.progressive.guard import Guard, Watch
from slabformer.progressive.optimizers import OptimizerWatch
from slabformer.settings import (
    FractionBelowOne,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFraction,
    PositiveInt,
    check_fractions,
    checked,
)

logger = logging.getLogger(__name__)

Shape = Literal["linear", "cosine"]
GUARD = Guard()
#: gammas as near as this are the same, whatever dtype stored them
_SAME = 1e-2
#: what a norm whose own fade is over keeps until all are done: compiled code is then built anew for every phase of the
#: schedule, not for every norm
_HELD_BACK = 2.0**-20


class ProgressiveSchedule:
    """Writes gamma into every PRepBN of a model after each optimizer step (Guo et al. 2024, section 4.1, eq. 4).

    Step ``t`` of ``total_steps`` runs with gamma 1 for the first ``warmup`` of training; then gamma falls over ``fade``
    of training, linearly ``1 - (t - t0) / T`` as published or by a half cosine, and is 0 from there on. Steps are
    optimizer steps: gradient accumulation, activation checkpointing and evaluation do not move it, nothing is read
    back from a device but what ``guard`` observes.

    Gamma never rises. On a model that has begun to fade, the schedule goes on from the model's gamma and logs a warning
    that says so; norms that have faded stay so. To fade again from 1, call ``set_gamma(1)`` on the norms first.

    Args:
        model: Holds the PRepBN modules; convert and build the optimizer first.
        total_steps: Optimizer steps of the whole training.
        warmup: Fraction of training with gamma 1 before fading starts.
        fade: Fraction of training over which gamma falls; the published models range from 0.08 to 0.80. 0.2 is good for
            vision models from random weights, 0.8 for language models, 0.05 for trained models after
            :func:`slabformer.fit_norms_`.
        shape: "linear" as published, or "cosine".
        warm_statistics: Let RepBN's statistics follow the data from the first step, also while gamma is 1, and average
            the first batches alike, so that they do not start from (0, 1). False is the published rule: statistics
            stand still while gamma is held at 1, then move by momentum alone.
        optimizer: One or several, checked to hold the parameters of the norms. Without it, those that step before the
            first ``step()`` and hold parameters of the model are looked at instead.
        start: Optimizer steps done already, in a training that goes on; gamma is that of the step to come.
        stagger: Share of the fade over which the norms begin one after the other; 0 fades all of them together, as
            published. Each norm's own fade takes ``(1 - stagger) * fade``.
        order: Which norms begin first: "depth", those that stand first in the model; names, from first to last; or a
            sensitivity by name, lowest first.
        align: Weight of the alignment term, see :meth:`alignment`.
        guard: When gamma waits while training explodes, and when training is given up; None looks away. Time spent
            waiting is made up for by a steeper fade, so that LayerNorm is gone when training ends.

    Raises:
        ValueError: If the model has no PRepBN, a setting is out of range, the schedule ends after training does, the
            norms are at different gammas above 0 without ``stagger``, ``order`` names other norms than the model's, or
            the optimizer was built before the norms were converted.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        total_steps: PositiveInt,
        warmup: FractionBelowOne = 0.0,
        fade: PositiveFraction = 0.2,
        shape: Shape = "linear",
        warm_statistics: bool = True,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        start: NonNegativeInt = 0,
        *,
        stagger: FractionBelowOne = 0.0,
        order: Literal["depth"] | Sequence[NonEmptyStr] | Mapping[str, Number] = "depth",
        align: NonNegativeFloat = 0.0,
        guard: Guard | None = GUARD,
    ) -> None:
        self._norms = prepbn_modules(model)
        if not self._norms:
            raise ValueError("the model has no PRepBN to fade; call convert_norms_(model) first")
        check_fractions(warmup, fade)
        self.total_steps, self.shape, self.warm_statistics, self.align = total_steps, shape, warm_statistics, align
        self.warmup_steps = min(round(warmup * total_steps), total_steps - 1)
        self.fade_steps = min(max(1, round(fade * total_steps)), total_steps - self.warmup_steps)
        self._stagger_steps = stagger * self.fade_steps
        #: when each norm begins, as a share of the stagger
        self._ranks = _ranks(self._norms, order)
        #: where the fade stands, in steps of a schedule that never waits
        self._step: float = start
        #: optimizer steps so far, those in which gamma waited among them
        self.steps_done = start
        self._waited = 0
        self._waits = False
        goes_on = self._go_on()
        self._guard = Watch(guard, self._norms) if guard is not None else None
        self._watch: OptimizerWatch | None = OptimizerWatch(self._norms, model)
        if optimizer is not None:
            for one in [optimizer] if isinstance(optimizer, Optimizer) else optimizer:
                self._watch.saw(one)
            self._check_optimizers()
        self._write(gamma=not goes_on)

    @property
    def gamma(self) -> float:
        """Share of the old norm in the step to come, the mean over all norms."""
        return sum(self.gammas.values()) / len(self._norms) if self._stagger_steps else self._gamma_at(0)

    @property
    def gammas(self) -> dict[str, float]:
        """Share of the old norm in the step to come, by the names of the norms."""
        return {name: self._gamma_at(rank) for name, rank in self._ranks.items()}

    def _gamma_at(self, rank: float) -> float:
        begin = self.warmup_steps + rank * self._stagger_steps
        if self._step < begin:
            return 1.0
        done = min((self._step - begin) / (self.fade_steps - self._stagger_steps), 1.0)
        return 1.0 - done if self.shape == "linear" else 0.5 + 0.5 * math.cos(math.pi * done) if done < 1 else 0.0

    @property
    def phase(self) -> Phase:
        """Which branches the step to come computes."""
        if self._step < self.warmup_steps:
            return "warm"
        return "fading" if self._step < self._end else "done"

    @property
    def _end(self) -> int:
        return self.warmup_steps + self.fade_steps

    @property
    def finished(self) -> bool:
        """Whether gamma has reached 0, so that nothing of the old norm is computed any more."""
        return self.phase == "done"

    def step(self, grad_norm: Tensor | float | None = None) -> None:
        """Move on by one optimizer step; call it once after every ``optimizer.step()``.

        Args:
            grad_norm: Of the gradient before it was clipped, as ``torch.nn.utils.clip_grad_norm_`` returns it, for the
                guard.

        Raises:
            DivergedError: If training has diverged, see :class:`slabformer.progressive.Guard`.
            RuntimeError: If ``align`` is above 0 and :meth:`alignment` was not part of the loss.
            ValueError: If the optimizer was built before the norms were converted.
        """
        if self._watch is not None and self._watch.has_seen:
            self._check_optimizers()
        self._check_aligned()
        alarm = self._observe(grad_norm)
        waits = alarm is not None and self.warmup_steps <= self._step < self._end
        if waits and not self._waits:
            logger.warning("gamma waits at %.3g from step %d on: %s", self.gamma, self.steps_done + 1, alarm)
        elif self._waits and not waits:
            logger.info("gamma moves on from %.3g in step %d", self.gamma, self.steps_done + 1)
        if waits:
            self._waited += 1
        else:
            self._step += self._stride()
        self._waits = waits
        self.steps_done += 1
        self._write()

    def alignment(self) -> Tensor:
        """How far RepBN is from the norm that it replaces, times ``align``: a term to add to the loss.

        The squared distance of the two branches' outputs over the square of the old norm's, which is not moved by it,
        averaged over the norms that still hold one; of the last forward, in float32. Zero once the fade is done::

            loss = criterion(model(x), y) + schedule.alignment()

        Raises:
            RuntimeError: If there is no forward to speak of, or it ran under reentrant activation checkpointing.
        """
        norms = [norm for norm in self._norms.values() if norm.aligns]
        terms = [norm.take_alignment() for norm in norms]
        found = [term for term in terms if term is not None]
        if not norms or self.align == 0:
            return torch.zeros((), device=next(iter(self._norms.values())).gamma.device)
        if not found:
            raise RuntimeError(
                "no forward in train mode since the last call: call alignment() after the model's forward"
            )
        if torch.is_grad_enabled() and not any(term.requires_grad for term in found):
            raise RuntimeError("alignment needs activation checkpointing with use_reentrant=False")
        return self.align * torch.stack(found).mean()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, and its settings, as plain values."""
        return {
            "step": self._step,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "fade_steps": self.fade_steps,
            "shape": self.shape,
            "warm_statistics": self.warm_statistics,
            "steps_done": self.steps_done,
            "waited": self._waited,
            "waits": self._waits,
            "stagger_steps": self._stagger_steps,
            "ranks": dict(self._ranks),
            "align": self.align,
            "guard": None if self._guard is None else self._guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``: step and settings are taken from it, gamma is written into the norms.

        The guard's limits are this schedule's own. States of version 0.1 hold no guard, stagger and alignment.

        Raises:
            ValueError: If a key is missing or unknown, the norms are others, or the model has faded further than the
                state; the schedule is then unchanged.
        """
        before = self.state_dict()
        added = {
            "steps_done": state.get("step"),
            "waited": 0,
            "waits": False,
            "stagger_steps": 0.0,
            "ranks": before["ranks"],
            "align": 0.0,
            "guard": None,
        }
        state = {**added, **state}
        if state.keys() != before.keys():
            raise ValueError(f"not a ProgressiveSchedule state: {sorted(state)} instead of {sorted(before)}")
        if state["ranks"].keys() != before["ranks"].keys():
            other = sorted(state["ranks"].keys() ^ before["ranks"].keys())
            raise ValueError(f"the state is of other norms than the model's (first: {other[0]})")
        self._restore(state)
        gammas = _gammas_of(self._norms)
        if self._is_behind(gammas):
            wanted, held = self.gamma, min(gammas.values(), default=0.0)
            self._restore(before)
            raise ValueError(
                f"the state is at gamma {wanted:.3g}, but the model has faded to {held:.3g}; "
                "load the model's weights of that step first"
            )
        self._write()

    def _restore(self, state: Mapping[str, Any]) -> None:
        settings = dict(state)
        self._step, self._waited, self._waits = (settings.pop(name) for name in ("step", "waited", "waits"))
        self._stagger_steps, self._ranks = settings.pop("stagger_steps"), dict(settings.pop("ranks"))
        guard = settings.pop("guard")
        if self._guard is not None and guard is not None:
            self._guard.load_state_dict(guard)
        self.__dict__.update(settings)

    def _observe(self, grad_norm: Tensor | float | None) -> str | None:
        """Why gamma must wait, if it must."""
        if self._guard is None:
            return None
        self._guard.observe(self.steps_done + 1, grad_norm)
        return self._guard.alarm

    def _stride(self) -> float:
        """How far one step takes the fade: 1, or more where time spent waiting is to be made up for."""
        left, fade_left = self.total_steps - self.steps_done, self._end - self._step
        return max(1, fade_left / left) if self._waited and 0 < left < fade_left else 1

    def _go_on(self) -> bool:
        """Move to where the model's gamma stands, if it has faded further than this schedule, or waited longer."""
        gammas = _gammas_of(self._norms)
        if not self._stagger_steps:
            _check_same(gammas.values())
        if not self._is_behind(gammas):
            self._notice_waiting(gammas)
            return False
        self._step = max(self._step_at(gamma, self._ranks[name]) for name, gamma in gammas.items())
        logger.warning(
            "the model has begun to fade before: the schedule goes on from its gamma of %.3g, at step %d; "
            "call set_gamma(1) on its norms first to fade again from 1",
            *(sum(gammas.values()) / len(gammas), self._step),
        )
        return True

    def _notice_waiting(self, gammas: Mapping[str, float]) -> None:
        """In a training that goes on, gamma above the schedule's has waited for the guard."""
        midway = [(gamma, self._ranks[name]) for name, gamma in gammas.items() if _HELD_BACK < gamma < 1]
        if self._step and midway and all(gamma > self._gamma_at(rank) + _SAME for gamma, rank in midway):
            start, self._step = self._step, max(self._step_at(gamma, rank) for gamma, rank in midway)
            self._waited = round(start - self._step)

    def _is_behind(self, gammas: Mapping[str, float]) -> bool:
        """Whether a norm has faded further than the schedule has it."""

        def further(gamma: float, own: float) -> bool:
            return gamma < own - (_SAME if own < 1 else 0)

        over = bool(gammas) and not any(gammas.values()) and not self.finished
        return over or any(further(gamma, self._gamma_at(self._ranks[name])) for name, gamma in gammas.items())

    def _step_at(self, gamma: float, rank: float) -> int:
        """First step whose gamma is not above ``gamma``; fading has an end only where that is 0."""
        begin, length = self.warmup_steps + rank * self._stagger_steps, self.fade_steps - self._stagger_steps
        if gamma == 0:
            return math.ceil(begin + length)
        if gamma == 1:
            return self.warmup_steps
        done = 1 - gamma if self.shape == "linear" else math.acos(2 * gamma - 1) / math.pi
        return min(math.ceil(begin + done * length - 0.05), self._end - 1)  # float32 rounds

    def _write(self, gamma: bool = True) -> None:
        phase = self.phase
        for name, norm in self._norms.items():
            share = self._gamma_at(self._ranks[name])
            if phase == "fading":
                share = max(share, _HELD_BACK)
            if gamma and (share == 0 or norm.known_phase != "done"):  # what was converted and faded earlier stays so
                norm.set_gamma(share, phase)
            norm.rep.warm_statistics = self.warm_statistics
            norm.aligns = self.align > 0 and norm.known_phase != "done"

    def _check_aligned(self) -> None:
        left = [name for name, norm in self._norms.items() if norm.take_alignment() is not None]
        if left:
            raise RuntimeError(
                f"align={self.align:g} is without effect: add schedule.alignment() to the loss before backward()"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": self._watch is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch = OptimizerWatch(self._norms) if state["_watch"] else None

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


def _ranks(norms: Mapping[str, PRepBN], order: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Where each norm stands in ``order``, from 0 for the first to 1 for the last.

    Raises:
        ValueError: If ``order`` names other norms than these.
    """
    if isinstance(order, str):
        names = list(norms)
    else:
        names = sorted(order, key=order.__getitem__) if isinstance(order, Mapping) else list(order)
        wrong = sorted(set(names) ^ set(norms)) or sorted(name for name in names if names.count(name) > 1)
        if wrong:
            what = (
                "twice" if wrong[0] in norms and wrong[0] in names else "not" if wrong[0] in norms else "without need"
            )
            raise ValueError(f"order must name every norm of the model once; {wrong[0]!r} is named {what}")
    places = {name: place / max(1, len(names) - 1) for place, name in enumerate(names)}
    return {name: places[name] for name in norms}


def _gammas_of(norms: Mapping[str, PRepBN]) -> dict[str, float]:
    """Share of the old norm in those that still hold it; 0 for all where none does, nothing on the meta device."""
    if any(norm.gamma.is_meta for norm in norms.values()):
        return {}
    held = {
        name: 1.0 if norm.phase == "warm" else min(max(float(norm.gamma), 0.0), 1.0)
        for name, norm in norms.items()
        if norm.phase != "done"
    }
    return held or dict.fromkeys(norms, 0.0)


def _check_same(gammas: Collection[float]) -> None:
    lowest, highest = min(gammas, default=0.0), max(gammas, default=0.0)
    if highest - lowest > _SAME:
        raise ValueError(
            f"the norms are at different gammas, {lowest:.3g} to {highest:.3g}, which one schedule cannot fade; "
            "bring them to one with set_gamma, or stagger the fade"
        )
