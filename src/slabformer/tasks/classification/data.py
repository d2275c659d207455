"""Batches whose content hangs on (seed, epoch, index) alone, whatever the workers, ranks and interruptions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slabformer.tasks.classification.augment import (
    AugmentConfig,
    Transform,
    eval_transform,
    light_augment,
    light_draws,
    train_transform,
)
from slabformer.tasks.classification.config import DataConfig
from slabformer.tasks.classification.sources import Source, Split, open_source
from slabformer.tasks.engine.order import BatchOrder, OrderedLoader, decoding_loader
from slabformer.tasks.engine.seeds import draws_from
from slabformer.tasks.images import Failure, Unreadable, candidates, first_readable, most_unreadable

__all__ = ["AugmentConfig", "DataConfig", "Loader", "check_num_classes", "create_loader"]
Batch = tuple[Tensor, Tensor]


def create_loader(
    data: DataConfig,
    augment: AugmentConfig,
    split: Split,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    drop_last: bool | None = None,
    source: Source | None = None,
) -> Loader:
    """Batches of ``split``: shuffled and augmented for "train", all images once and in order for "validation".

    Every global batch of ``world_size * batch_size`` images is the same however many ranks share it.

    Args:
        data: Which images, and the model's input.
        augment: What training images go through.
        split: "train" or "validation".
        batch_size: Images of one rank in one batch.
        seed: Of the order and of the augmentation.
        rank: This process.
        world_size: Number of processes.
        num_workers: Processes that decode images; no effect on what comes out, nor on sources held in memory.
        drop_last: Leave out the last, incomplete batch; by default for "train" only.
        source: Read instead of the images that ``data`` names.

    Raises:
        ValueError: If the data is incomplete (see :func:`open_source`) or smaller than one batch.
        FileNotFoundError: If a folder does not exist.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    train = split == "train"
    policy = augment.policy if train else "none"
    source = open_source(data, split) if source is None else source
    order = BatchOrder(
        len(source),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle=train,
        drop_last=train if drop_last is None else drop_last,
    )
    in_memory = data.path == "digits"
    if policy == "light" and not in_memory:
        raise ValueError(f"augment.policy 'light' is for data held in memory (digits); use 'timm' for {data.path!r}")
    if in_memory and policy != "timm":
        return MemoryLoader(source, order, data, augment if policy == "light" else None)
    transform = train_transform(data, augment) if train else eval_transform(data)
    return ImageLoader(Samples(source, transform, seed, replace=train), order, num_workers, data.max_unreadable)


def check_num_classes(class_names: list[str], num_classes: int) -> None:
    """Refuse data whose classes are not as many as the model's.

    Raises:
        ValueError: If they differ.
    """
    if len(class_names) != num_classes:
        some = ", ".join(class_names[:3])
        raise ValueError(
            f"the data has {len(class_names)} classes ({some}, ...), the model {num_classes}; "
            f"create the model with num_classes={len(class_names)}, or check data.path"
        )


class Loader(OrderedLoader):
    """Batches of ``(images, labels)``: normalised float32 ``(B, 3, H, W)`` and int64 ``(B,)``.

    Attributes:
        class_names: Name of every class, by label.
        order: Which images make which batch.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...


class MemoryLoader(Loader):
    """Images decoded and resized once, augmented a batch at a time.

    Args:
        source: What to read.
        order: Which images make which batch.
        data: The model's input.
        augment: Its ``light_*`` fields move the images; None leaves them as they are.
    """

    def __init__(self, source: Source, order: BatchOrder, data: DataConfig, augment: AugmentConfig | None) -> None:
        super().__init__(order, source.class_names)
        transform = eval_transform(data, normalize=False)
        samples = [source.read(index) for index in range(len(source))]
        images = torch.stack([transform(image) for image, _ in samples])  # (N, 3, H, W) of uint8
        grey = bool((images == images[:, :1]).all())
        self.images = (images[:, :1] if grey else images).float().div_(255)
        self.labels = torch.tensor([label for _, label in samples])
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        self.augment = augment

    def __iter__(self) -> Iterator[Batch]:
        epoch, batches = self.order.epoch, self.order.take()
        draws = light_draws(self.order.seed, epoch, len(self.images)) if self.augment else None
        for indices in map(torch.from_numpy, batches):
            images = self.images[indices]
            if self.augment is not None and draws is not None:
                images = light_augment(images, draws[indices], self.augment)
            yield (images - self.mean).div_(self.std), self.labels[indices]


class Sample(NamedTuple):
    """One image on its way into a batch, and what could not be read on the way."""

    image: Tensor | None
    label: int
    failures: list[Failure]


class Samples(Dataset[Sample]):
    """Images by ``(epoch, index)``, so that workers need no state.

    Args:
        source: What to read.
        transform: PIL image to tensor, drawing from the global generators.
        seed: Of the augmentation.
        replace: Give another image, drawn from (seed, epoch, index), for one that cannot be read; else none.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, *, replace: bool) -> None:
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        tried = candidates(self.seed, epoch, index, len(self.source), replace=self.replace)
        read, failures = first_readable(tried, self.source.read, self.source.name)
        if read is None:
            return Sample(None, -1, failures)
        image, label = read
        with draws_from(self.seed, epoch, index):
            return Sample(self.transform(image), label, failures)


class Loaded(NamedTuple):
    """What workers hand over: a batch, without its unreadable images, and their names."""

    images: Tensor
    labels: Tensor
    failures: list[Failure]


def _collate(samples: list[Sample]) -> Loaded:
    read = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in read if sample.image is not None]) if read else torch.empty(0)
    failures = [failure for sample in samples for failure in sample.failures]
    return Loaded(images, torch.tensor([sample.label for sample in read]), failures)


class ImageLoader(Loader):
    """Images decoded as they are needed, by worker processes where asked.

    Args:
        samples: Images by (epoch, index).
        order: Which images make which batch.
        num_workers: Processes that decode.
        max_unreadable: See :class:`DataConfig`.
    """

    def __init__(self, samples: Samples, order: BatchOrder, num_workers: int, max_unreadable: float) -> None:
        super().__init__(order, samples.source.class_names)
        self.loader = decoding_loader(samples, order, num_workers, _collate)
        self.unreadable = Unreadable(most_unreadable(max_unreadable, len(samples)))

    def __iter__(self) -> Iterator[Batch]:
        for loaded in self.loader:
            self.unreadable.count(loaded.failures)
            if len(loaded.labels):
                yield loaded.images, loaded.labels
