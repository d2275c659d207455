"""Which images make which batch: a function of (seed, epoch), the same for any number of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from slabformer.tasks.engine.signals import held_back, leave_signals_to_parent


class Stream(IntEnum):
    """First of the numbers that seed a generator, so that no two uses draw the same."""

    ORDER = 101
    AUGMENT = 102
    LIGHT = 103
    REPLACE = 104


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Batches of one rank as lists of ``(epoch, index)``: its slice of every global batch.

    Args:
        count: Number of images.
        batch_size: Images of one rank in one batch.
        seed: Of the shuffling.
        rank: This process.
        world_size: Number of processes.
        shuffle: Draw a new order from (seed, epoch).
        drop_last: Leave out the last, incomplete global batch; otherwise late ranks may get a shorter one or none.

    Raises:
        ValueError: If sizes make no sense, or ``drop_last`` leaves nothing.
    """

    def __init__(
        self, count: int, *, batch_size: int, seed: int, rank: int, world_size: int, shuffle: bool, drop_last: bool
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if drop_last and count < batch_size * world_size:
            total = f"{batch_size} x {world_size} ranks" if world_size > 1 else str(batch_size)
            raise ValueError(f"{count} training images do not fill one batch of {total}; use a smaller batch_size")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = self.start = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size * self.world_size)
        return whole if self.drop_last else whole + (rest > self.rank * self.batch_size)

    def take(self) -> list[NDArray[np.int64]]:
        """Indices of the epoch's batches from ``start`` on, which goes back to 0."""
        indices = np.arange(self.count)
        if self.shuffle:
            indices = np.random.default_rng((Stream.ORDER, self.seed, self.epoch)).permutation(self.count)
        stride, offset = self.batch_size * self.world_size, self.batch_size * self.rank
        first, self.start = self.start, 0
        starts = (batch * stride + offset for batch in range(first, len(self)))
        return [indices[start : start + self.batch_size] for start in starts]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batches = self.epoch, self.take()
        return ([(epoch, int(index)) for index in batch] for batch in batches)


class OrderedLoader(ABC):
    """Batches as a :class:`BatchOrder` has them; an epoch goes on in its middle without reading what came before.

    Args:
        order: Which images make which batch.
        class_names: Name of every class, by label.
    """

    def __init__(self, order: BatchOrder, class_names: list[str]) -> None:
        self.order, self.class_names = order, class_names

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, wherever the next iteration starts."""
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Order and augmentation of iterations to come."""
        self.order.epoch = epoch

    def set_start(self, batch_index: int) -> None:
        """Let the next iteration, and only that one, begin at ``batch_index`` without reading what came before."""
        if not 0 <= batch_index <= len(self):
            raise ValueError(f"cannot start at batch {batch_index} of an epoch of {len(self)}; did the data change?")
        self.order.start = batch_index

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...


class WorkerLoader(DataLoader[Any]):
    """A ``DataLoader`` whose workers leave signals to this process, however they are started."""

    def __iter__(self) -> Any:
        with held_back() if self.num_workers else nullcontext():
            return super().__iter__()


def decoding_loader(
    dataset: Dataset[Any], order: BatchOrder, num_workers: int, collate: Callable[[list[Any]], Any]
) -> DataLoader[Any]:
    """Batches of ``order`` out of ``num_workers`` processes that live on from epoch to epoch, or out of this one."""
    return WorkerLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that the global one does not move
        worker_init_fn=leave_signals_to_parent,
    )
