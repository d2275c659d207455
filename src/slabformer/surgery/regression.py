"""Least squares for one line per channel, from sums that merge over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from slabformer.ops.precision import wide, wide_device

#: tokens that are widened to float64 at a time
_BLOCK = 4096


class PairSums:
    """Weighted means and co-moments of pairs ``(x, y)`` per channel, in float64 (Chan et al. 1979, eq. 2.1).

    Attributes:
        weight: Sum of the weights.
        mean: Of x and y, ``(2, C)``.
        products: Sums of squares of x, products, and squares of y, about the means, ``(3, C)``.
    """

    def __init__(self, num_channels: int, device: torch.device) -> None:
        device = wide_device(device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(2, num_channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(3, num_channels, dtype=torch.float64, device=device)

    def merge(self, weight: Tensor, mean: Tensor, products: Tensor) -> None:
        """Take the sums of other pairs in."""
        total = self.weight + weight
        share = weight / total.clamp(min=torch.finfo(torch.float64).tiny)
        dx, dy = mean - self.mean
        self.products = self.products + products + torch.stack([dx * dx, dx * dy, dy * dy]) * self.weight * share
        self.mean = self.mean + (mean - self.mean) * share
        self.weight = total

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Take in pairs ``(N, C)`` with weights ``(N,)`` that sum to more than 0."""
        weight = weights.sum()
        shares = (weights / weight).unsqueeze(-1)
        mean = torch.stack([(shares * x).sum(0), (shares * y).sum(0)])
        x, y = x - mean[0], y - mean[1]
        weighted = weights.unsqueeze(-1) * x
        squares = (weights.unsqueeze(-1) * y.square()).sum(0)
        self.merge(weight, mean, torch.stack([(weighted * x).sum(0), (weighted * y).sum(0), squares]))

    def row(self) -> Tensor:
        """All of it in one tensor, for another rank."""
        return torch.cat([self.weight.reshape(1), self.mean.flatten(), self.products.flatten()])

    def merge_row(self, row: Tensor) -> None:
        """Take in the :meth:`row` of another rank."""
        C = self.mean.shape[1]
        self.merge(row[0], row[1 : 1 + 2 * C].view(2, C), row[1 + 2 * C :].view(3, C))


class TokenSums:
    """What a fit of one norm needs to know of its tokens: of all alike, and weighted by how small they are.

    Attributes:
        alike: Population statistics.
        relative: Each token weighted by one over its own standard deviation, so that a few tokens of massive
            activations (Sun et al. 2024) do not decide alone.
    """

    def __init__(self, num_channels: int, device: torch.device) -> None:
        self.alike = PairSums(num_channels, device)
        self.relative = PairSums(num_channels, device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in tokens ``(N, C)`` and what they are to become, in blocks, so that little is held in float64."""
        for x_block, y_block in zip(x.split(_BLOCK), y.split(_BLOCK), strict=True):
            x_wide, y_wide = wide(x_block), wide(y_block)
            if len(x_wide):
                self.alike.add(x_wide, y_wide, torch.ones_like(x_wide[:, 0]))
                self.relative.add(x_wide, y_wide, _relative_weights(x_wide))

    def row(self) -> Tensor:
        """All of it in one tensor, for another rank."""
        return torch.cat([self.alike.row(), self.relative.row()])

    def merge_row(self, row: Tensor) -> None:
        """Take in the :meth:`row` of another rank."""
        alike, relative = row.chunk(2)
        self.alike.merge_row(alike)
        self.relative.merge_row(relative)


def _relative_weights(x: Tensor) -> Tensor:
    """One over each token's standard deviation; one that hardly varies weighs no more than ten ordinary ones."""
    deviation = x.std(-1, correction=0)
    return 1 / deviation.clamp(min=max(0.1 * float(deviation.median()), torch.finfo(torch.float64).eps))
