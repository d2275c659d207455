"""What a recipe would cost on a machine without an accelerator, before it begins."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

from slabformer.models.detection.mask_rcnn import Detector
from slabformer.tasks.detection.loader import DetectionLoader
from slabformer.tasks.engine.seeds import random_state, set_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator

#: hours on a CPU that nobody needs to be asked about
FREE_HOURS = 2.0


def refuse_slow_cpu(detector: Detector, loader: DetectionLoader, num_batches: int, accelerator: Accelerator) -> None:
    """Time one batch, forward and backward, on a copy, and refuse a training of many hours.

    Args:
        detector: As it will be trained; left as it is.
        loader: Of the training images.
        num_batches: Of the whole training.
        accelerator: Whose CPU and precision it will be trained with.

    Raises:
        ValueError: If it would take more than :data:`FREE_HOURS`; says how long, and how to go on all the same.
    """
    hours = _seconds(copy.deepcopy(detector), loader, accelerator) * num_batches / 3600
    if hours > FREE_HOURS:
        raise ValueError(
            f"no accelerator here: {num_batches:,} batches would take about {_readable(hours)} on this CPU, going by "
            "the first one; --device cpu trains all the same, recipes/detection_digits.yaml is made for CPUs"
        )


def _seconds(detector: Detector, loader: DetectionLoader, accelerator: Accelerator) -> float:
    """Of a batch, reading included; random numbers are as they were before."""
    state = random_state()
    loader.set_epoch(0)
    loader.set_start(0)
    start = time.perf_counter()
    batch = next(iter(loader))
    with accelerator.autocast():
        losses = detector.train()(batch.images, batch.targets)
    sum(losses.values()).backward()
    set_random_state(state)
    return time.perf_counter() - start


def _readable(hours: float) -> str:
    return f"{hours / 24:,.0f} days" if hours > 48 else f"{hours:.0f} hours"
