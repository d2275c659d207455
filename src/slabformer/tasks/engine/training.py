"""What a training run consists of, and where it stands; :mod:`slabformer.tasks.engine.loop` makes it go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from slabformer.progressive import ProgressiveSchedule
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.ema import ModelEma
from slabformer.tasks.engine.meter import EpochMeter
from slabformer.tasks.engine.parts import Loader, LoopConfig, Position, StepFn

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(kw_only=True, eq=False)
class Training:
    """Model, data, schedules and position: whatever the rest of training depends on is here, or follows from it."""

    accelerator: Accelerator
    """Device, precision and ranks."""
    model: nn.Module
    """On the accelerator's device, not wrapped."""
    optimizer: Optimizer
    """Of the model's parameters."""
    loader: Loader
    """This rank's training batches."""
    step_fn: StepFn
    """``step_fn(model, batch) -> loss``, the mean over the batch's samples, or the losses that it is the sum of."""
    config: LoopConfig
    """Of the loop."""
    store: CheckpointStore | None = None
    """Where checkpoints go; None keeps none."""
    lr_schedule: Any = None
    """One of timm's that counts updates; None keeps the rate."""
    gamma_schedule: ProgressiveSchedule | None = None
    """None if no norm fades."""
    ema: ModelEma | None = None
    """None for no average."""
    batch_names: Callable[[int], list[str]] | None = None
    """Names of the samples in a batch of the current epoch, for the message about a non-finite one."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """Plain values; a checkpoint with others is not gone on from."""
    position: Position = field(default_factory=Position, init=False)
    """Steps and batches done."""
    best: float = field(default=-math.inf, init=False)
    """Highest score of an evaluated epoch so far."""

    def __post_init__(self) -> None:
        self.meter = EpochMeter(self.accelerator.device)
        self.batches_per_epoch = len(self.loader)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the last one may have fewer batches."""
        return math.ceil(self.batches_per_epoch / self.config.accumulate)

    @property
    def gamma(self) -> float:
        """Share of LayerNorm in the step to come; 0 where nothing fades."""
        return self.gamma_schedule.gamma if self.gamma_schedule is not None else 0.0
