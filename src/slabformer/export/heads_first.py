"""Linear attention as engines like it in floating point: each head's tokens together from the projection on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slabformer.export.maps import MapAttention, pointwise, to_maps, to_tokens
from slabformer.nn.attention import LinearAttentionCore, SimplifiedLinearAttention
from slabformer.nn.attention_variants import PyramidLinearAttention
from slabformer.nn.resample import Grid, resolve_grid

#: of the normaliser, as in :func:`slabformer.ops.linear_attention`
EPS = 1e-6


class HeadsFirstAttention(MapAttention):
    """Linear attention whose queries, keys and values are projected apart, for engines that take a graph as it is.

    One projection for the three must be cut apart, which OpenVINO does by copying, before each is transposed; with one
    head nothing is transposed at all. Projections are 1x1 convolutions. The scale that keeps sums in range in half
    precision is left out, and the normaliser is a product. In float32.

    Args:
        attention: In eval mode; its weights are taken over or copied.

    Shape:
        ``(B, N, C)`` to the same.
    """

    def __init__(self, attention: SimplifiedLinearAttention | PyramidLinearAttention) -> None:
        super().__init__()
        self.num_heads, self.grid_size = attention.num_heads, attention.grid_size
        self.q, self.k, self.v = (pointwise(layer) for layer in projections_of(attention))
        self.proj, self.dwc = pointwise(attention.proj), attention.dwc
        self.core = attention  # resamples its table for other grids
        self.table = nn.Parameter(attention.table(attention.grid_size).detach().clone())
        self.train(False)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid_size: Grid | None = None
    ) -> Tensor:
        """Attention over tokens ``(B, N, C)`` on ``grid_size``; by default the table's, or a square.

        Raises:
            ValueError: If there is a mask, or tokens form no grid.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention written for an engine takes no mask; write the model without one")
        return to_tokens(self.on_maps(to_maps(x, resolve_grid(x.shape[1], grid_size, self.grid_size))))

    def on_maps(self, maps: Tensor) -> Tensor:
        """See :meth:`MapAttention.on_maps`."""
        grid = (maps.shape[2], maps.shape[3])
        table = self.table if grid == self.grid_size else self.core.table(grid)
        q, k, v = (self._heads(x) for x in (self.q(maps).relu(), self.k(maps), self.v(maps)))
        k = (k + table).relu()
        normaliser = q @ k.sum(2).unsqueeze(3) + EPS  # (B, num_heads, N, 1)
        out = q @ (k.transpose(2, 3) @ v) / normaliser
        local = to_tokens(self.dwc(to_maps(v.flatten(0, 1), grid))).unflatten(0, (-1, self.num_heads))
        return self.proj(to_maps((out + local).transpose(1, 2).flatten(2), grid))

    def _heads(self, maps: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, num_heads, N, D)``."""
        return to_tokens(maps).unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def takes_heads_first(attention: LinearAttentionCore) -> bool:
    """Whether queries, keys and values come from the same tokens, in float32."""
    return getattr(attention, "sr_ratio", 1) == 1 and attention.positional_encoding.dtype == torch.float32


def projections_of(attention: SimplifiedLinearAttention | PyramidLinearAttention) -> list[nn.Linear]:
    """Linears for queries, keys and values, one each."""
    if isinstance(attention, PyramidLinearAttention):
        return [attention.q, *split_projection(attention.kv, 2)]
    return split_projection(attention.qkv)


def split_projection(packed: nn.Linear, parts: int = 3) -> list[nn.Linear]:
    """Queries, keys and values projected apart."""
    layers = []
    biases = [None] * parts if packed.bias is None else packed.bias.detach().chunk(parts)
    for weight, bias in zip(packed.weight.detach().chunk(parts), biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        layers.append(layer)
    return layers
