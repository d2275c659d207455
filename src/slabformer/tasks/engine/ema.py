"""An exponential moving average of a model whose LayerNorm fades."""

from __future__ import annotations

from typing import Any

from torch import nn

from slabformer._extras import require
from slabformer.nn.controls import copy_gamma_


def decay_at(step: int, decay: float, warmup: bool = False) -> float:
    """Weight of the past in optimizer step ``step``, counted from 1, as timm's ``ModelEmaV3`` has it.

    Args:
        step: Of training.
        decay: The largest weight.
        warmup: Whether it begins lower.
    """
    average = require("timm.utils", extra="vision").ModelEmaV3(nn.LayerNorm(1), decay=decay, use_warmup=warmup)
    return float(average.get_decay(step))


class ModelEma:
    """timm's ``ModelEmaV3``, but gamma is copied: its average would be a blend that was never trained.

    Args:
        model: Averaged; build this before the model is wrapped or compiled.
        decay: Weight of the past in each step.
        warmup: Average more recent weights at first (timm's decay warm-up), for short runs.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        self._ema = require("timm.utils", extra="vision").ModelEmaV3(model, decay=decay, use_warmup=warmup)

    @property
    def module(self) -> nn.Module:
        """The averaged model, in eval mode."""
        return self._ema.module

    def update(self, model: nn.Module, step: int) -> None:
        """Take in ``model`` after optimizer step ``step``."""
        self._ema.update(model, step=step)
        copy_gamma_(model, self.module)

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """Restore the average; gamma and phase are those of ``model``."""
        self.module.load_state_dict(state)
        copy_gamma_(model, self.module)
