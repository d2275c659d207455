"""Token grids: which one it is, and tables and tokens carried over to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from slabformer.ops.moments import accumulation_dtype

Grid = tuple[int, int]


def resolve_grid(num_tokens: int, given: Grid | None, default: Grid) -> Grid:
    """Grid ``(H, W)`` of ``num_tokens`` tokens: the given one, else the default if it fits, else a square.

    Raises:
        ValueError: If the given grid holds another number of tokens, or none was given and there is no square.
    """
    if given is not None:
        if given[0] * given[1] != num_tokens:
            raise ValueError(f"grid_size {tuple(given)} does not hold {num_tokens} tokens")
        return given[0], given[1]
    if default[0] * default[1] == num_tokens:
        return default
    side = int(math.sqrt(num_tokens)) if torch.jit.is_scripting() else math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"{num_tokens} tokens form no square grid; pass grid_size=(H, W)")
    return side, side


def resize_tokens(x: Tensor, old: Grid, new: Grid, mode: str = "bilinear") -> Tensor:
    """Tokens ``(B, N, C)`` of one grid interpolated to another, in float32 where they are shorter."""
    if old == new:
        return x
    maps = x.to(accumulation_dtype(x.dtype)).unflatten(1, old).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=new, mode=mode, align_corners=False)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(x.dtype)


def resize_tokens_1d(x: Tensor, num_tokens: int) -> Tensor:
    """Tokens ``(B, N, C)`` stretched along the flattened sequence, as published for spatial reduction."""
    if x.shape[1] == num_tokens:
        return x
    sequence = x.to(accumulation_dtype(x.dtype)).transpose(1, 2)
    return F.interpolate(sequence, size=num_tokens, mode="linear").transpose(1, 2).to(x.dtype)


def resample_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position table ``(1, N, C)`` of one grid, bicubic on another, without antialiasing."""
    return resize_tokens(table, old, new, mode="bicubic")


def window_partition(x: Tensor, grid_size: Grid, window_size: Grid) -> Tensor:
    """Tokens ``(B, N, C)`` cut into windows ``(B * num_windows, h * w, C)``, row by row.

    Raises:
        ValueError: If windows do not tile the grid.
    """
    (H, W), (h, w) = grid_size, window_size
    if H % h or W % w:
        raise ValueError(f"windows of {h}x{w} do not tile a grid of {H}x{W}; pad it, or choose another window")
    windows = x.reshape(-1, H // h, h, W // w, w, x.shape[-1]).transpose(2, 3)
    return windows.reshape(-1, h * w, x.shape[-1])


def window_merge(windows: Tensor, grid_size: Grid, window_size: Grid) -> Tensor:
    """Back from :func:`window_partition` to ``(B, N, C)``."""
    (H, W), (h, w) = grid_size, window_size
    x = windows.reshape(-1, H // h, W // w, h, w, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, H * W, windows.shape[-1])
