"""The images of `slab train` for MindSpore: torch's loader behind a ``GeneratorDataset``.

Images are decoded, augmented and mixed by the code of `slab train`, so both train on the same pictures, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from slabformer.mindspore.runtime import require
from slabformer.tasks.classification.data import Loader
from slabformer.tasks.classification.mixup import MixedStep
from slabformer.tasks.engine.seeds import reseed

#: what a step is given: images, a distribution over classes for each, and the number of the step
COLUMNS = ("images", "targets", "step")
Row = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]


class TrainingBatches:
    """Training batches of one epoch after the other; MindSpore asks for an iterator each epoch.

    All epochs must have the same number of batches, so that the rest of a begun one is read by itself.

    Args:
        loader: Of this rank.
        mixed: Mixes a batch, drawing from (seed, step, rank).
        num_classes: Of the model.
        smoothing: Share of a label that is spread over all classes, where ``mixed`` has not done so.
        seed: Of the run.
        rank: This process.
        epoch: To begin with.
        batch: Of that epoch to begin with.
    """

    def __init__(
        self,
        loader: Loader,
        mixed: MixedStep,
        num_classes: int,
        smoothing: float,
        *,
        seed: int,
        rank: int = 0,
        epoch: int = 0,
        batch: int = 0,
    ) -> None:
        self.loader, self.mixed, self.num_classes, self.smoothing = loader, mixed, num_classes, smoothing
        self.seed, self.rank, self.epoch, self.batch = seed, rank, epoch, batch
        self.length = len(loader) - batch
        #: what went wrong while MindSpore read, which tells it in its own words
        self.error: Exception | None = None

    def __len__(self) -> int:
        """Batches of an epoch, of the begun one where it begins in the middle."""
        return self.length

    def __iter__(self) -> Iterator[Row]:
        epoch, start = self.epoch, self.batch
        self.epoch, self.batch = epoch + 1, 0
        self.loader.set_epoch(epoch)
        self.loader.set_start(start)
        try:
            for step, batch in zip(itertools.count(epoch * len(self.loader) + start), self.loader, strict=False):
                reseed(self.seed, step, self.rank)
                images, targets = self.mixed.mix(batch)
                yield images.numpy(), self._distribution(targets).numpy(), np.asarray(step, np.int32)
        except Exception as error:
            self.error = error
            raise

    def _distribution(self, targets: Tensor) -> Tensor:
        """Labels ``(B,)`` as shares of classes ``(B, num_classes)``; shares stay."""
        if targets.ndim == 2:
            return targets.float()
        one_hot = F.one_hot(targets, self.num_classes).float()
        return one_hot * (1 - self.smoothing) + self.smoothing / self.num_classes


def training_dataset(batches: TrainingBatches) -> Any:
    """``batches`` for ``mindspore.train.Model``, read in one thread beside the training."""
    dataset = require().dataset
    return dataset.GeneratorDataset(
        batches, list(COLUMNS), shuffle=False, num_parallel_workers=1, python_multiprocessing=False
    )


def whole_batches(run: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[Tensor], Tensor]:
    """``run`` of batches that are filled up to ``batch_size`` with zeros: MindSpore compiles each size anew."""

    def filled(images: Tensor) -> Tensor:
        missing = batch_size - len(images)
        if missing > 0:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return run(images)[: len(images) - max(missing, 0)]

    return filled
