"""Whether training explodes while norms fade: activations and gradients against what they were."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from slabformer.nn.prepbn import PRepBN
from slabformer.settings import PositiveInt, Range, Settings

#: observations before the first judgement
_ENOUGH = 3
_GRADIENT = "the gradient"
#: stands for a size that could not be seen
_UNSEEN = -1.0


class DivergedError(RuntimeError):
    """Training has diverged: an activation is no longer finite, or has left its usual size far behind."""


@dataclass(kw_only=True)
class Guard(Settings):
    """When gamma waits, and when training is given up.

    Observed are the root mean square of every norm's input, from its running statistics, and the norm of the gradient
    where it is handed to :meth:`slabformer.ProgressiveSchedule.step`. Each is judged against its own running median, so
    that sizes which change slowly, as they do in any training, raise no alarm.
    """

    limit: Annotated[float, Range(gt=1)] = 10.0
    """Times the running median; above it gamma waits."""
    stop: Annotated[float, Range(gt=1)] = 1e4
    """Times the running median of an activation; above it, or if one is not finite, training has diverged."""
    window: Annotated[int, Range(ge=_ENOUGH, le=10_000)] = 50
    """Observations that the median is taken over."""
    every: PositiveInt = 10
    """Optimizer steps between observations; gradients are observed at every step."""


class Watch:
    """What was observed so far, and the judgement on it.

    An observation stays on the device until the next step reads it: once for all norms, every ``every`` steps. Ranks
    whose norms share their statistics (:func:`slabformer.sync_norms_`) judge alike.

    Args:
        guard: Settings.
        norms: By name, in the model's order.
    """

    def __init__(self, guard: Guard, norms: Mapping[str, PRepBN]) -> None:
        self.guard, self._norms = guard, norms
        self.names = [_GRADIENT, *norms]
        self._history: deque[list[float]] = deque(maxlen=guard.window)
        self._pending: Tensor | None = None
        self._gradient: Tensor | None = None
        #: why gamma waits, in words; None where it need not
        self.alarm: str | None = None

    def observe(self, step: int, grad_norm: Tensor | float | None) -> None:
        """Judge what was observed before ``step``, and look anew where it is time.

        Raises:
            DivergedError: With the first norm that shows it.
        """
        if self._pending is not None:
            self._judge(self._pending.tolist(), step)
            self._pending = None
        if grad_norm is not None:
            norm = torch.as_tensor(grad_norm, dtype=torch.float32).detach()
            self._gradient = norm if self._gradient is None else torch.maximum(self._gradient, norm)
        if step % self.guard.every == 0:
            self._pending = self._look()
            self._gradient = None

    @torch.no_grad()
    def _look(self) -> Tensor | None:
        """Gradient and activations as one vector, on the device."""
        reps = [norm.rep for norm in self._norms.values()]
        device = reps[0].running_var.device
        if device.type == "meta":
            return None
        sizes = torch.stack(
            [
                (rep.running_var + rep.running_mean.square()).mean().sqrt().to(device, torch.float32)
                if norm.known_phase != "warm" or rep.observes_while_warm
                else torch.full((), _UNSEEN, device=device)
                for norm, rep in zip(self._norms.values(), reps, strict=True)
            ]
        )
        gradient = torch.full((), _UNSEEN, device=device) if self._gradient is None else self._gradient.to(device)
        return torch.cat([gradient.reshape(1), sizes])

    def _judge(self, sizes: Sequence[float], step: int) -> None:
        self.alarm = None
        for name, size, median in zip(self.names, sizes, self._medians(), strict=True):
            times = size / median if median is not None and size != _UNSEEN else 0.0
            is_activation = name != _GRADIENT
            if is_activation and not (math.isfinite(size) and times <= self.guard.stop):
                found = f"{times:.3g} times their running median" if math.isfinite(size) else "not finite"
                raise DivergedError(
                    f"training has diverged at step {step}: activations into {name} are {found}; lower the learning "
                    "rate, clip the gradient, or start from fit_norms_"
                )
            if self.alarm is None and math.isfinite(times) and times > self.guard.limit:
                subject = f"activations into {name} are" if is_activation else f"{name} is"
                self.alarm = f"{subject} {times:.3g} times {'their' if is_activation else 'its'} running median"
        self._history.append(list(sizes))

    def _medians(self) -> list[float | None]:
        """Of every size over the window; None where too little was seen."""
        columns = zip(*self._history, strict=True) if self._history else [()] * len(self.names)
        seen = [[size for size in column if size > 0 and math.isfinite(size)] for column in columns]
        return [statistics.median(column) if len(column) >= _ENOUGH else None for column in seen]

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as plain values."""
        return {
            "history": [list(sizes) for sizes in self._history],
            "pending": None if self._pending is None else self._pending.tolist(),
            "gradient": None if self._gradient is None else float(self._gradient),
            "alarm": self.alarm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._history = deque((list(sizes) for sizes in state["history"]), maxlen=self.guard.window)
        self._pending = None if state["pending"] is None else torch.tensor(state["pending"])
        self._gradient = None if state["gradient"] is None else torch.tensor(state["gradient"])
        self.alarm = state["alarm"]
