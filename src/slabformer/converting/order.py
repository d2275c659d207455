"""Batches by step: the data is gone through again and again, an evaluation comes after so many steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slabformer.tasks.engine.order import BatchOrder, Stream


class StepOrder(BatchOrder):
    """A run's batches in parts of equal length, which the loop takes for epochs; the data's own epochs run through.

    Args:
        count: Number of samples.
        batches: In each part.
        batch_size: Samples of one rank in one batch.
        seed: Of the shuffling.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If the data is smaller than one batch of all ranks.
    """

    def __init__(self, count: int, batches: int, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        super().__init__(
            count, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, shuffle=True, drop_last=True
        )
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def take(self) -> list[NDArray[np.int64]]:
        """Indices of the part's batches from ``start`` on, which goes back to 0."""
        first, self.start = self.start, 0
        whole = self.count // (self.batch_size * self.world_size)
        orders: dict[int, NDArray[np.int64]] = {}
        taken = []
        for batch in range(self.epoch * self.batches + first, (self.epoch + 1) * self.batches):
            data_epoch, place = divmod(batch, whole)
            if data_epoch not in orders:
                generator = np.random.default_rng((Stream.ORDER, self.seed, data_epoch))
                orders = {data_epoch: generator.permutation(self.count)}
            begin = (place * self.world_size + self.rank) * self.batch_size
            taken.append(orders[data_epoch][begin : begin + self.batch_size])
        return taken
