"""Depthwise convolution over token grids."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def depthwise_tokens(x: Tensor, grid_size: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Zero-padded depthwise convolution of tokens on their grid, over a channels-last view: nothing is transposed.

    Args:
        x: Tokens ``(B, N, C)``.
        grid_size: ``(H, W)`` with ``H * W == N``.
        weight: Kernels ``(C, 1, K, K)``, ``K`` odd.
        bias: ``(C,)`` or None.

    Shape:
        ``(B, N, C)`` to the same.
    """
    maps = x.unflatten(1, grid_size).permute(0, 3, 1, 2)
    maps = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return maps.permute(0, 2, 3, 1).flatten(1, 2)
