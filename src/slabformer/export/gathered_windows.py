"""Shifted windows as engines like them: cut and joined by one gather each, projections apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slabformer.export.heads_first import split_projection
from slabformer.export.maps import MapAttention, pointwise, to_maps, to_tokens
from slabformer.nn.padding import PadTokens
from slabformer.nn.resample import Grid
from slabformer.nn.shifted_windows import ShiftedWindowAttention


class GatheredWindowAttention(nn.Module):
    """:class:`ShiftedWindowAttention` that gathers the tokens of its windows, for engines that take a graph as it is.

    A roll is two slices and a concatenation, and in integers no rounding is moved in front of those: shifted maps would
    be copied about as floats, three times. Nor can one projection of queries, keys and values be rounded before they
    are cut apart and transposed. Maps that windows do not tile, or of another size than tables are kept for, go as
    they did.

    Args:
        attention: In eval mode; taken over.

    Shape:
        ``(B, N, C)`` to the same.
    """

    order: Tensor
    places: Tensor

    def __init__(self, attention: ShiftedWindowAttention) -> None:
        super().__init__()
        self.attention, self.windows = attention, attention.windows
        self.q, self.k, self.v = split_projection(attention.qkv)
        tokens = torch.arange(self.windows.grid[0] * self.windows.grid[1]).view(1, -1, 1)
        self.tiled = self.windows.padded == self.windows.grid
        order = self.windows.cut(tokens, PadTokens(1)).flatten() if self.tiled else tokens.flatten()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", order.argsort(), persistent=False)
        self.train(False)

    def forward(self, x: Tensor, grid_size: Grid | None = None) -> Tensor:
        """Attention over tokens ``(B, N, C)`` on ``grid_size``; by default the one that tables are kept for."""
        return self.attention.proj(self.attended(x)) if self.gathers(grid_size) else self.attention(x, grid_size)

    def gathers(self, grid_size: Grid | None) -> bool:
        """Whether windows on this grid are gathered."""
        return self.tiled and grid_size in (None, self.windows.grid)

    def attended(self, x: Tensor) -> Tensor:
        """What the output projection reads."""
        h, w = self.windows.window
        cut = x.index_select(1, self.order).reshape(-1, h * w, x.shape[-1])
        out = self.attention.attend(self.q(cut), self.k(cut), self.v(cut), self.windows)
        # strides of an attention's output differ between kernels: a view of it would not survive an export
        out = out.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        return out.view(x.shape).index_select(1, self.places)


class GatheredWindowMaps(GatheredWindowAttention, MapAttention):
    """:class:`GatheredWindowAttention` between maps, for floating point; see :class:`MapAttention`."""

    def __init__(self, attention: ShiftedWindowAttention) -> None:
        super().__init__(attention)
        self.proj = pointwise(attention.proj)

    def on_maps(self, maps: Tensor) -> Tensor:
        """See :meth:`MapAttention.on_maps`."""
        grid = (maps.shape[2], maps.shape[3])
        if not self.gathers(grid):
            return to_maps(self.attention(to_tokens(maps), grid), grid)
        return self.proj(to_maps(self.attended(to_tokens(maps)), grid))
