"""Linear attention as integer runtimes like it: nothing between its products but what they can absorb."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slabformer.export.heads_first import EPS, split_projection
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.resample import Grid, resample_table, resolve_grid


class IntegerLinearAttention(nn.Module):
    """:class:`SimplifiedLinearAttention` whose heads share one product of full width, for OpenVINO's 8-bit kernels.

    Head by head, queries, keys and values must be cut out of one projection, transposed, and transposed back, and each
    copy costs an integer model what a projection does. Here projections are apart, so that ReLU and rounding happen
    as they write, and ``K^T V`` is taken over all channels at once: what channels of different heads have in common is
    multiplied by 0. That product and the sums of keys are divided by the mean of their head's keys, which cancels and
    gives all images and heads one range, and the normaliser is not rounded. The kernels of the depthwise branch are
    repeated for every head.

    Args:
        attention: In eval mode; its weights are copied.

    Shape:
        ``(B, N, C)`` to the same.
    """

    mask: Tensor

    def __init__(self, attention: SimplifiedLinearAttention) -> None:
        super().__init__()
        dim, heads = attention.dim, attention.num_heads
        self.heads, self.grid_size = (heads, dim // heads), attention.grid_size
        self.q, self.k, self.v = split_projection(attention.qkv)
        self.proj = attention.proj
        self.table = nn.Parameter(attention.positional_encoding.detach().clone())
        self.dwc = _repeated(attention.dwc, heads)
        head_of = torch.arange(dim) // self.heads[1]
        self.register_buffer("mask", (head_of[:, None] == head_of).to(self.table), persistent=False)
        self.train(False)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid_size: Grid | None = None
    ) -> Tensor:
        """Attention over tokens ``(B, N, C)`` on ``grid_size``; by default the table's, or a square.

        Raises:
            ValueError: If there is a mask, or tokens form no grid.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention in integers takes no mask; quantize the model without one")
        grid = resolve_grid(x.shape[1], grid_size, self.grid_size)
        q, k, v = self.q(x).relu(), (self.k(x) + self._table(grid)).relu(), self.v(x)
        local = self.dwc(v.unflatten(1, grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        sums = k.sum(1).unflatten(1, self.heads)  # (B, num_heads, D)
        # by the mean of its head, which cancels: keys of all images and heads then share one range
        rate = 1 / (sums.mean(2, keepdim=True) + EPS)  # (B, num_heads, 1)
        kv = (k.transpose(1, 2) @ v) * (self.mask * rate.expand_as(sums).flatten(1).unsqueeze(1))  # (B, C, C)
        # no product of matrices, which would be rounded: an error here is that of every token
        weighted = q.unflatten(2, self.heads) * (sums * rate).unsqueeze(1)
        normaliser = weighted.sum(3) + EPS * rate.flatten(1).unsqueeze(1)  # (B, N, num_heads)
        out = (q @ kv).unflatten(2, self.heads) / normaliser.unsqueeze(3) + local.unflatten(2, self.heads)
        return self.proj(out.flatten(2))

    def _table(self, grid: Grid) -> Tensor:
        return self.table if grid == self.grid_size else resample_table(self.table, self.grid_size, grid)


def _repeated(shared: nn.Conv2d, times: int) -> nn.Conv2d:
    """The depthwise convolution ``shared`` by ``times`` heads as one over all their channels."""
    dim, size = times * shared.in_channels, shared.kernel_size[0]
    conv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=shared.bias is not None).to(shared.weight)
    repeats = {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in shared.state_dict().items()}
    conv.load_state_dict(repeats)
    return conv
