"""Attention as pyramid backbones (PVT) hold it, softmax and linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.attention import LinearAttentionCore, refuse_attn_drop, refuse_uneven_heads, shared_depthwise
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.resample import Grid, resize_tokens_1d, resolve_grid
from slabformer.ops.native.linear_attention import Biases

Resize = Literal["2d", "1d"]


class SpatialReduction(nn.Module):
    """What both have: a map reduced by an unpadded strided convolution and a norm."""

    if TYPE_CHECKING:  # TorchScript would read them
        sr: nn.Conv2d
        norm: nn.Module
        sr_ratio: int

    def reduced(self, x: Tensor, grid_size: Grid) -> Tensor:
        """Tokens ``(B, N, C)`` on ``grid_size`` to fewer ones.

        Raises:
            ValueError: If the grid is smaller than a stride.
        """
        if min(grid_size[0], grid_size[1]) < self.sr_ratio:
            raise ValueError(f"a grid of {grid_size[0]}x{grid_size[1]} cannot be reduced by sr_ratio {self.sr_ratio}")
        maps = self.sr(x.unflatten(1, grid_size).permute(0, 3, 1, 2))
        return self.norm(maps.permute(0, 2, 3, 1).flatten(1, 2))


class PyramidAttention(SpatialReduction):
    """Softmax attention with spatial reduction (Wang et al. 2021, PVT), on ``F.scaled_dot_product_attention``.

    With ``sr_ratio > 1`` keys and values come from the map reduced by an unpadded strided convolution and a norm. Where
    the reduction does not divide the grid, rows and columns that fill no patch are no keys, as published.

    Args:
        dim: Channels ``C``.
        num_heads: Heads of ``C / num_heads`` channels.
        sr_ratio: Reduction of keys and values on either axis.
        qkv_bias: Whether queries, keys and values have a bias.
        norm_layer: Of the reduced map.
        attn_drop: Dropout of attention weights.
        proj_drop: Dropout after the output projection.

    Shape:
        ``(B, N, C)`` to the same.

    Raises:
        ValueError: If ``dim`` is no multiple of ``num_heads``, tokens form no grid, or it is smaller than ``sr_ratio``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        *,
        qkv_bias: bool = True,
        norm_layer: Callable[..., nn.Module] = PRepBN,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_uneven_heads(dim, num_heads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.sr_ratio, self.attn_drop = dim, num_heads, sr_ratio, attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **factory)
            self.norm = norm_layer(dim, **factory)

    def forward(self, x: Tensor, grid_size: Grid | None = None) -> Tensor:
        """Attention over tokens ``(B, N, C)`` on ``grid_size``, by default a square."""
        keys_values = x
        if hasattr(self, "sr"):
            keys_values = self.reduced(x, resolve_grid(x.shape[1], grid_size, (0, 0)))
        k, v = self.kv(keys_values).chunk(2, dim=-1)
        q, k, v = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.q(x), k, v)]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        """Width, heads and reduction."""
        return f"{self.dim}, num_heads={self.num_heads}, sr_ratio={self.sr_ratio}"


class PyramidLinearAttention(SpatialReduction, LinearAttentionCore):
    """:class:`SimplifiedLinearAttention` as pyramid backbones hold it: separate ``q`` and ``kv``, spatial reduction.

    With ``sr_ratio > 1`` keys and values come from the map reduced by an unpadded strided convolution and a norm, the
    position table has as many rows as that map has tokens, and values are stretched back to the queries' grid for the
    depthwise branch. Where the reduction does not divide the grid, rows and columns that fill no patch are no keys.

    Args:
        dim: Channels ``C``.
        num_heads: Heads of ``C / num_heads`` channels.
        sr_ratio: Reduction of keys and values on either axis.
        grid_size: Grid ``(H, W)`` of the input that the position table is made for.
        qkv_bias: Whether queries, keys and values have a bias.
        kernel_size: Of the depthwise convolution, odd.
        resize: How reduced values are stretched: "2d" over the grid, or "1d" along the sequence, as published.
        norm_layer: Of the reduced map.
        attn_drop: Must be 0: there is no attention matrix to drop from.
        proj_drop: Dropout after the output projection.

    Shape:
        ``(B, N, C)`` to the same.

    Raises:
        ValueError: If tokens form no grid, it is smaller than ``sr_ratio``, or an argument is none of its values.
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
        resize: Resize = "2d",
        norm_layer: Callable[..., nn.Module] = PRepBN,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid_size=_reduced(grid_size, sr_ratio), **factory)
        refuse_attn_drop(attn_drop)
        if resize not in get_args(Resize):
            raise ValueError(f"resize must be one of {get_args(Resize)}, got {resize!r}")
        self.sr_ratio, self.resize = sr_ratio, resize
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
        reduced = x
        if hasattr(self, "sr"):
            reduced = self.reduced(x, grid)
        key_grid = _reduced(grid, r)
        if torch.jit.is_scripting():
            return self.scripted(x, reduced, grid, key_grid)
        biases: Biases | None = None
        if r > 1:
            tokens = [self.q(x), self.kv(reduced)]
        else:
            tokens, biases = self.project(x, self.q, self.kv)
        q, k, v = self.heads(tokens[0], *tokens[1].chunk(2, dim=-1))
        fast = biases is not None or self.takes_kernel(q, k, v)
        if fast and grid == key_grid:
            out = self.attend(q, k, v, key_grid, None, self.shared_kernels(), biases)
        else:
            v = v.contiguous()  # once for both branches
            out = self.attend(q, k, v, key_grid, native=fast)
            if self.resize == "1d":
                v, key_grid = resize_tokens_1d(v.flatten(0, 1), x.shape[1]).unflatten(0, v.shape[:2]), grid
            out = out + self.local(v, key_grid, grid)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def scripted(self, x: Tensor, reduced: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
        """The rest of the forward in what TorchScript knows."""
        k, v = self.kv(reduced).chunk(2, dim=-1)
        if self.resize == "2d" or key_grid == grid:
            return self.proj_drop(self.proj(self.composed(self.q(x), k, v, key_grid, grid)))
        out = self.composed(self.q(x), k, v, key_grid, None)
        values = resize_tokens_1d(self.split(v).flatten(0, 1), x.shape[1]).unflatten(0, (x.shape[0], self.num_heads))
        return self.proj_drop(self.proj(out + self.local(values, grid, grid).transpose(1, 2).flatten(2)))

    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample the position table for inputs on a new grid for good."""
        super().set_grid_size(_reduced(grid_size, self.sr_ratio))


def _reduced(grid_size: Grid, sr_ratio: int) -> Grid:
    return grid_size[0] // sr_ratio, grid_size[1] // sr_ratio
