"""Depthwise convolution over token grids."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def depthwise_tokens(x: Tensor, grid_size: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Zero-padded depthwise convolution of tokens on their grid; a channels-last view, so nothing is transposed.

    Args:
        x: Tokens ``(B, N, C)``.
        grid_size: ``(H, W)`` with ``H * W == N``.
        weight: Kernels ``(C, 1, K, K)``, ``K`` odd. ``(D, 1, K, K)`` with ``C`` a multiple of ``D`` shares them
            between heads of ``D`` channels.
        bias: As many as kernels, or None.

    Shape:
        ``(B, N, C)`` to the same.
    """
    B, N, C = x.shape
    num_heads = C // weight.shape[0]
    if num_heads > 1:  # a longer kernel is cheaper than heads in the batch, which need the tokens transposed
        weight = weight.repeat(num_heads, 1, 1, 1)
        bias = None if bias is None else bias.repeat(num_heads)
    maps = x.reshape(B, *grid_size, C).permute(0, 3, 1, 2)
    maps = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=C)
    return maps.permute(0, 2, 3, 1).reshape(B, N, C)
