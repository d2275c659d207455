"""Mixup, CutMix and the loss that goes with them, as one step over a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slabformer._extras import require
from slabformer.tasks.classification.config import AugmentConfig
from slabformer.tasks.classification.data import Batch


class MixedStep:
    """The loss of a batch, mixed as ``augment`` says; timm does the mixing and holds the losses.

    Draws from NumPy's global generator, which the trainer seeds from (seed, step, rank).

    Args:
        augment: Mixup, CutMix and label smoothing.
        num_classes: Classes of the model.
        batch_size: Images of one rank in one batch.

    Raises:
        ValueError: If ``batch_size`` is odd and batches are mixed: images are mixed in pairs.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, batch_size: int) -> None:
        loss = require("timm.loss", extra="vision")
        self._mixup: Any = None
        if augment.mixup > 0 or augment.cutmix > 0:
            if batch_size % 2:
                raise ValueError(f"mixup needs an even batch_size, got {batch_size}; or turn it off")
            self._mixup = require("timm.data", extra="vision").Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
            self._loss: nn.Module = loss.SoftTargetCrossEntropy()
        elif augment.label_smoothing > 0:
            self._loss = loss.LabelSmoothingCrossEntropy(augment.label_smoothing)
        else:
            self._loss = nn.CrossEntropyLoss()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of ``model`` over ``batch``, which is left as it is."""
        images, targets = self.mix(batch)
        return self.loss(model(images), targets)

    def mix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and targets as they are trained on."""
        images, targets = batch
        return (images, targets) if self._mixup is None else self._mixup(images.clone(), targets)  # timm mixes in place

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of ``logits`` against mixed targets."""
        return self._loss(logits, targets)
