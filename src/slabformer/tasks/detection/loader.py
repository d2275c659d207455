"""Batches for the detector whose content hangs on (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slabformer.tasks.detection.config import DetectionAugment, DetectionData, Split
from slabformer.tasks.detection.dataset import DetectionDataset, Sample, open_source
from slabformer.tasks.detection.grouping import AspectOrder
from slabformer.tasks.detection.transforms import eval_transform, train_transform
from slabformer.tasks.engine.order import BatchOrder, OrderedLoader, decoding_loader
from slabformer.tasks.images import Failure, Unreadable, most_unreadable


@dataclass
class DetectionBatch:
    """Images of any sizes with their targets."""

    images: list[Tensor]
    """RGB in [0, 1], ``(3, H, W)`` each, resized."""
    targets: list[dict[str, Any]]
    """For every image "boxes" ``(n, 4)`` as left, top, right, bottom in its pixels, "labels" ``(n,)`` from 1 on,
    "masks" ``(n, H, W)`` of 0 and 1 unless for boxes alone, "image_id", "original_size" ``(height, width)``, "name"."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device, non_blocking: bool = False) -> DetectionBatch:
        """The batch with its tensors on ``device``."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DetectionBatch:
        """The batch in memory that an accelerator copies from at once; DataLoader asks for it."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> DetectionBatch:
        targets = [
            {name: change(value) if isinstance(value, Tensor) else value for name, value in target.items()}
            for target in self.targets
        ]
        return DetectionBatch([change(image) for image in self.images], targets)


def create_loader(
    data: DetectionData,
    augment: DetectionAugment,
    split: Split,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> DetectionLoader:
    """Batches of ``split``: shuffled, grouped and augmented for "train", all images once, in order for "validation".

    Every global batch of ``world_size * batch_size`` images is the same however many ranks share it.

    Args:
        data: Which images.
        augment: What training images go through.
        split: "train" or "validation".
        batch_size: Images of one rank in one batch.
        seed: Of the order and of the augmentation.
        rank: This process.
        world_size: Number of processes.
        num_workers: Processes that decode images; no effect on what comes out.

    Raises:
        ValueError: If the data cannot be used (see :func:`open_source`) or a setting makes no sense.
        FileNotFoundError: If files are missing.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    train = split == "train"
    source = open_source(data, split)
    place: dict[str, int] = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
    order: BatchOrder
    if train:
        order = AspectOrder([(image.height, image.width) for image in source.images], **place)
        transform = train_transform(augment)
    else:
        order = BatchOrder(len(source.images), **place, shuffle=False, drop_last=False)
        transform = eval_transform(augment)
    dataset = DetectionDataset(source, transform, seed, masks=data.masks, replace=train)
    return DetectionLoader(dataset, order, num_workers, most_unreadable(data.max_unreadable, len(dataset)))


class DetectionLoader(OrderedLoader):
    """Batches of an epoch, resumable in its middle.

    Args:
        dataset: Images by (epoch, index).
        order: Which images make which batch.
        num_workers: Processes that decode.
        limit: Unreadable images that are put up with.

    Attributes:
        annotations: Of the images, for metrics.
        class_names: Name of every class, by label - 1.
        category_ids: The annotation file's id of every class, by label - 1.
        has_masks: Whether targets have masks.
    """

    def __init__(self, dataset: DetectionDataset, order: BatchOrder, num_workers: int, limit: int) -> None:
        self.annotations = dataset.source.annotations
        super().__init__(order, self.annotations.class_names)
        self.category_ids = self.annotations.category_ids
        self.dataset, self.has_masks = dataset, dataset.masks
        self.unreadable = Unreadable(limit)
        self.loader = decoding_loader(dataset, order, num_workers, _collate)

    def __iter__(self) -> Iterator[DetectionBatch]:
        for batch, failures in self.loader:
            self.unreadable.count(failures)
            if len(batch):
                yield batch

    def batch_names(self, batch_index: int) -> list[str]:
        """File names of the images that make batch ``batch_index`` of the current epoch."""
        before, self.order.start = self.order.start, batch_index
        indices = self.order.take()[0]
        self.order.start = before
        return [self.dataset.source.images[index].file_name for index in indices]


def _collate(samples: list[Sample]) -> tuple[DetectionBatch, list[Failure]]:
    read = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    batch = DetectionBatch([image for image, _ in read], [target for _, target in read])
    return batch, [failure for sample in samples for failure in sample.failures]
