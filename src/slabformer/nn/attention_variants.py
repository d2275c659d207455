"""Simplified linear attention as pyramid backbones (PVT) and windowed ones (CSWin) hold it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slabformer.nn.attention import LinearAttentionCore, refuse_attn_drop, shared_depthwise
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.resample import Grid, resize_tokens_1d, resolve_grid, window_merge, window_partition
from slabformer.ops.depthwise import depthwise_tokens


class PyramidLinearAttention(LinearAttentionCore):
    """:class:`SimplifiedLinearAttention` as pyramid backbones hold it: separate ``q`` and ``kv``, spatial reduction.

    With ``sr_ratio > 1`` keys and values come from the map reduced by an unpadded strided convolution and a norm, the
    position table has as many rows as that map has tokens, and values are stretched back along the flattened sequence
    for the depthwise branch, as published.

    Args:
        dim: Channels ``C``.
        num_heads: Heads of ``C / num_heads`` channels.
        sr_ratio: Reduction of keys and values on either axis.
        grid_size: Grid ``(H, W)`` of the input that the position table is made for.
        qkv_bias: Whether queries, keys and values have a bias.
        kernel_size: Of the depthwise convolution, odd.
        norm_layer: Of the reduced map.
        attn_drop: Must be 0: there is no attention matrix to drop from.
        proj_drop: Dropout after the output projection.

    Shape:
        ``(B, N, C)`` to the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        *,
        grid_size: Grid = (14, 14),
        qkv_bias: bool = True,
        kernel_size: int = 5,
        norm_layer: type[nn.Module] = PRepBN,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        reduced = (grid_size[0] // sr_ratio, grid_size[1] // sr_ratio)
        super().__init__(dim, num_heads, grid_size=reduced, **factory)
        refuse_attn_drop(attn_drop)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **factory)
            self.norm = norm_layer(dim, **factory)
        self.dwc = shared_depthwise(dim // num_heads, kernel_size, **factory)

    def forward(self, x: Tensor, grid_size: Grid | None = None) -> Tensor:
        """Attention over tokens ``(B, N, C)`` on ``grid_size``; by default the table's, or a square."""
        r = self.sr_ratio
        grid = resolve_grid(x.shape[1], grid_size, (self.grid_size[0] * r, self.grid_size[1] * r))
        key_grid = (grid[0] // r, grid[1] // r)
        k, v = self.kv(self._reduce(x, grid)).chunk(2, dim=-1)
        local = resize_tokens_1d(v, x.shape[1])
        q, k, v, local = self.heads(self.q(x), k, v, local)
        out = self.attend(q, k, v, key_grid) + self.local(local, grid, grid)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _reduce(self, x: Tensor, grid: Grid) -> Tensor:
        if self.sr_ratio == 1:
            return x
        maps = self.sr(x.unflatten(1, grid).permute(0, 3, 1, 2))
        return self.norm(maps.permute(0, 2, 3, 1).flatten(1, 2))


class WindowLinearAttention(LinearAttentionCore):
    """Linear attention inside windows of given q, k, v, plus LePE, without projections: a branch of SLAB-CSWin.

    ``o + DWC(v) + LePE(v)`` in every window, where LePE is a 3x3 depthwise convolution with kernels of its own for
    every channel.

    Args:
        dim: Channels ``C`` of the branch.
        num_heads: Heads of ``C / num_heads`` channels.
        window_size: Window ``(h, w)`` that the position table is made for.
        kernel_size: Of the shared depthwise convolution, odd.

    Shape:
        Three ``(B, H * W, C)`` to ``(B, H * W, C)``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Grid,
        *,
        kernel_size: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid_size=window_size, **factory)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.dwc = shared_depthwise(dim // num_heads, kernel_size, **factory)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid_size: Grid, window_size: Grid | None = None) -> Tensor:
        """Attention of tokens on ``grid_size`` inside windows; ``window_size`` by default is the table's."""
        window = window_size or self.grid_size
        q, k, v = (window_partition(t, grid_size, window) for t in (q, k, v))
        lepe = depthwise_tokens(v, window, self.get_v.weight, self.get_v.bias)
        q, k, v = self.heads(q, k, v)
        out = self.attend(q, k, v, window) + self.local(v, window, window)
        return window_merge(out.transpose(1, 2).flatten(2) + lepe, grid_size, window)
