"""Batches of images of one orientation: padding to a common size costs least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slabformer.tasks.engine.order import BatchOrder, Stream


class AspectOrder(BatchOrder):
    """Shuffled batches that are landscape or portrait throughout, on all ranks alike.

    A global batch of ``world_size * batch_size`` images is of one group (as published, each rank's share is), so it is
    the same however many ranks share it. A group is filled up to whole batches with images of its own, as published:
    no image is left out of an epoch, and fewer than one global batch a group come twice.

    Args:
        sizes: Height and width of every image; square ones go with portrait.
        batch_size: Images of one rank in one batch.
        seed: Of the shuffling.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If sizes make no sense.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], *, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        settings = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
        super().__init__(len(sizes), **settings, shuffle=True, drop_last=False)
        landscape = np.array([width > height for height, width in sizes], dtype=bool)
        self.groups = [group for group in (landscape.nonzero()[0], (~landscape).nonzero()[0]) if len(group)]

    def __len__(self) -> int:
        stride = self.batch_size * self.world_size
        return sum(-(-len(group) // stride) for group in self.groups)

    def take(self) -> list[NDArray[np.int64]]:
        """Indices of the epoch's batches from ``start`` on, which goes back to 0."""
        rng = np.random.default_rng((Stream.ORDER, self.seed, self.epoch))
        stride = self.batch_size * self.world_size
        batches = [batch for group in self.groups for batch in _whole_batches(group, stride, rng)]
        batches = [batches[index] for index in rng.permutation(len(batches))]
        first, self.start = self.start, 0
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [batch[mine] for batch in batches[first:]]


def _whole_batches(group: NDArray[np.int64], stride: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    extra = rng.choice(group, -len(group) % stride)
    return np.split(np.concatenate([rng.permutation(group), extra]), np.arange(stride, len(group), stride))
