"""The learning rate of detectors: a warm-up counted in steps, then drops after given epochs, or a cosine."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from slabformer.tasks.detection.config import RateConfig


class RateSchedule:
    """Sets every group's rate to its own times a factor that depends on nothing but the number of steps done.

    Args:
        optimizer: Its rates now are the full ones.
        config: The recipe's.
        epochs: Of the whole training.
        steps_per_epoch: Optimizer steps.

    Raises:
        ValueError: If warm-up, or the epochs before the last fall, fill the whole training.
    """

    def __init__(self, optimizer: Optimizer, config: RateConfig, *, epochs: int, steps_per_epoch: int) -> None:
        self.optimizer, self.config, self.steps_per_epoch = optimizer, config, steps_per_epoch
        self.total = epochs * steps_per_epoch
        if config.warmup_steps >= self.total:
            raise ValueError(
                f"lr_schedule.warmup_steps ({config.warmup_steps}) must be below the {self.total} steps of training; "
                f"give --lr-schedule.warmup-steps {self.total // 10}, or more epochs"
            )
        if config.name == "step" and config.milestones and config.milestones[-1] >= epochs:
            raise ValueError(f"lr_schedule.milestones {config.milestones} must be below epochs ({epochs})")
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self.step_update(0)

    def factor(self, step: int) -> float:
        """Share of the full rate after ``step`` optimizer steps."""
        config = self.config
        if config.name == "cosine":
            share = 0.5 + 0.5 * math.cos(math.pi * min(step / self.total, 1.0))
        else:
            share = config.decay ** sum(step >= epoch * self.steps_per_epoch for epoch in config.milestones)
        if step < config.warmup_steps:
            share *= 1 - (1 - step / config.warmup_steps) * (1 - config.warmup_start)
        return share

    def step_update(self, num_updates: int) -> None:
        """Set the rates for the step after ``num_updates``."""
        factor = self.factor(num_updates)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """The full rates: all else follows from the position."""
        return {"rates": self._rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The full rates of the run that goes on."""
        self._rates = list(state["rates"])
