"""The branches of CSWin: attention of given queries, keys and values inside windows, plus LePE, without projections."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.attention import LinearAttentionCore, refuse_uneven_heads, shared_depthwise
from slabformer.nn.resample import Grid, window_merge, window_partition
from slabformer.ops.depthwise import depthwise_tokens
from slabformer.ops.linear_attention import composed_linear_attention

Direction = Literal["vertical", "horizontal"]


class WindowLinearAttention(LinearAttentionCore):
    """Linear attention inside windows, ``o + DWC(v) + LePE(v)``: a branch of SLAB-CSWin.

    LePE is a 3x3 depthwise convolution with kernels of its own for every channel. Both convolutions read the same
    values, so they run as one, whose kernels are the sum of theirs.

    Args:
        dim: Channels ``C`` of the branch.
        num_heads: Heads of ``C / num_heads`` channels.
        window_size: Window ``(h, w)`` that the position table is made for.
        kernel_size: Of the shared depthwise convolution, odd and 3 at least.

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
        self.get_v = lepe(dim, **factory)
        self.dwc = shared_depthwise(dim // num_heads, kernel_size, **factory)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid_size: Grid, window_size: Grid | None = None) -> Tensor:
        """Attention of tokens on ``grid_size`` inside windows; ``window_size`` by default is the table's."""
        return self.inside(q, k, v, grid_size, self.grid_size if window_size is None else window_size)

    def inside(self, q: Tensor, k: Tensor, v: Tensor, grid_size: Grid, window: Grid) -> Tensor:
        """Attention of tokens on ``grid_size`` inside windows that tile it."""
        q, k, v = [window_partition(t, grid_size, window) for t in (q, k, v)]
        values = v.contiguous()  # once for both branches
        weight, bias = self.kernels()
        if torch.jit.is_scripting():
            out = composed_linear_attention(self.split(q), self.split(k), self.split(values), self.table(window))
            out = out.transpose(1, 2).flatten(2) + depthwise_tokens(values, window, weight, bias)
            return window_merge(out, grid_size, window)
        q, k, v = self.heads(q, k, values)
        if self.takes_kernel(q, k, v):
            shape = (self.num_heads, -1)
            kernels = weight.squeeze(1).unflatten(0, shape), bias.unflatten(0, shape)
            out = self.attend(q, k, v, window, None, kernels).transpose(1, 2).flatten(2)
        else:
            out = self.attend(q, k, v, window).transpose(1, 2).flatten(2)
            out = out + depthwise_tokens(values, window, weight, bias)
        return window_merge(out, grid_size, window)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Weight ``(C, 1, K, K)`` and bias of both convolutions in one."""
        border = (self.dwc.kernel_size[0] - self.get_v.kernel_size[0]) // 2
        weight = self.dwc.weight.repeat(self.num_heads, 1, 1, 1) + F.pad(self.get_v.weight, (border,) * 4)
        shared, own = self.dwc.bias, self.get_v.bias
        assert shared is not None
        assert own is not None
        return weight, shared.repeat(self.num_heads) + own


class StripeAttention(nn.Module):
    """Softmax attention inside stripes as long as the map, plus LePE: a branch of CSWin (Dong et al. 2022).

    Where stripes do not tile the map, the last one is narrower: nothing is padded, so nothing needs a mask.

    Args:
        dim: Channels ``C`` of the branch.
        num_heads: Heads of ``C / num_heads`` channels.
        width: Of a stripe in tokens; None for one that is the map.
        direction: "vertical" stripes are as high as the map, "horizontal" ones as wide.

    Shape:
        Three ``(B, H * W, C)`` to ``(B, H * W, C)``.

    Raises:
        ValueError: If ``dim`` is no multiple of ``num_heads``, the width not positive, or the direction unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        width: int | None = None,
        direction: Direction = "vertical",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_uneven_heads(dim, num_heads)
        if width is not None and width < 1:
            raise ValueError(f"stripes need a width of 1 or more, or None for the whole map, got {width}")
        if direction not in get_args(Direction):
            raise ValueError(f"direction must be one of {get_args(Direction)}, got {direction!r}")
        self.num_heads, self.width = num_heads, width
        self.axis = 1 if direction == "vertical" else 0  # of the grid, across the stripes
        self.get_v = lepe(dim, device=device, dtype=dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid_size: Grid) -> Tensor:
        """Attention of tokens on ``grid_size`` inside stripes."""
        q, k, v = [t.unflatten(1, grid_size) for t in (q, k, v)]
        length, across = grid_size[1] if self.axis == 1 else grid_size[0], 1 + self.axis
        tiled = length - length % min(length if self.width is None else self.width, length)
        if tiled == length:
            return self._attend(q, k, v).flatten(1, 2)
        rest = length - tiled
        stripes = self._attend(q.narrow(across, 0, tiled), k.narrow(across, 0, tiled), v.narrow(across, 0, tiled))
        last = self._attend(q.narrow(across, tiled, rest), k.narrow(across, tiled, rest), v.narrow(across, tiled, rest))
        return torch.cat([stripes, last], across).flatten(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values ``(B, H, W, C)`` that stripes tile to ``(B, H, W, C)``."""
        H, W = q.shape[1], q.shape[2]
        across = W if self.axis == 1 else H
        width = across if self.width is None else min(self.width, across)
        window = (H, width) if self.axis == 1 else (width, W)
        q, k, v = [window_partition(t, (H, W), window) for t in (q, k, v)]
        local = depthwise_tokens(v, window, self.get_v.weight, self.get_v.bias)
        q, k, v = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return window_merge(out + local, (H, W), window).unflatten(1, (H, W))

    def extra_repr(self) -> str:
        """Heads and stripes."""
        return f"num_heads={self.num_heads}, width={self.width}, direction={get_args(Direction)[1 - self.axis]!r}"


def lepe(dim: int, **factory: Any) -> nn.Conv2d:
    """Locally enhanced positional encoding: a 3x3 depthwise convolution over values (Dong et al. 2022, CSWin)."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
