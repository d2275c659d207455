"""Linear attention in the place of a softmax attention whose projections it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.attention import LinearAttentionCore, check_odd, key_mask
from slabformer.nn.resample import Grid, resolve_grid
from slabformer.ops.depthwise import depthwise_tokens
from slabformer.settings import NonNegativeInt, PositiveInt, checked


class ConvertedLinearAttention(LinearAttentionCore):
    """``out(relu(q) (relu(k + table)^T v) / normaliser + DWC(v))`` on an attention's projections (Guo et al. 2024).

    Prefix tokens (class and register tokens) attend and are attended to like all others; the depthwise branch runs on
    the patch tokens alone. It has a kernel for each channel, where the paper's heads share theirs: what heads of a
    trained model look at differs too much (docs/log.md). Projections keep their names, so that files of the original
    model load.

    Args:
        projections: Of queries, keys and values, by their names: one Linear of all three, or three.
        out: What follows the heads, by its names, in order; takes ``(B, N, C)``.
        num_heads: Heads of ``D = C / num_heads`` channels.
        grid_size: Grid ``(H, W)`` of the patch tokens that the position table is made for; others are resampled.
        num_prefix_tokens: Tokens in front of the patches, which have entries of their own in the table.
        kernel_size: Of the depthwise convolution, odd.
        returns_weights: Whether the forward returns ``(output, None)``, where transformers' attentions return the
            attention matrix.

    Shape:
        ``(B, N, C)`` to the same.

    Raises:
        ValueError: If tokens form no grid, or a mask tells queries apart.
    """

    @checked
    def __init__(
        self,
        projections: Mapping[str, nn.Linear],
        out: Mapping[str, nn.Module],
        num_heads: PositiveInt,
        *,
        grid_size: tuple[PositiveInt, PositiveInt],
        num_prefix_tokens: NonNegativeInt = 0,
        kernel_size: PositiveInt = 5,
        returns_weights: bool = False,
    ) -> None:
        first = next(iter(projections.values()))
        factory: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
        dim = first.out_features * len(projections) // 3
        super().__init__(dim, num_heads, grid_size=grid_size, **factory)
        self.prefix_encoding: nn.Parameter | None
        self.num_prefix_tokens, self.returns_weights = num_prefix_tokens, returns_weights
        own = nn.Parameter(torch.zeros(1, num_prefix_tokens, dim, **factory)) if num_prefix_tokens else None
        self.register_parameter("prefix_encoding", own)  # an empty one would be a parameter without a gradient
        self._projections, self._out = tuple(projections), tuple(out)
        for name, module in {**projections, **out}.items():
            self.add_module(name, module)
        check_odd(kernel_size)
        self.dwc = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory)
        nn.init.zeros_(self.dwc.weight)
        assert self.dwc.bias is not None
        nn.init.zeros_(self.dwc.bias)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """As the attention that it replaces; masks are valid keys, boolean ``(B, N)`` or ``(B, 1, 1, N)``."""
        mask = kwargs.pop("attn_mask", attention_mask)
        asked = [name for name, value in kwargs.items() if value is not None and value is not False]
        if asked:
            raise ValueError(f"linear attention takes tokens and a mask of keys, got {', '.join(asked)}")
        x = self.mixed(hidden_states, key_mask(mask))
        for name in self._out:
            x = self.get_submodule(name)(x)
        return (x, None) if self.returns_weights else x

    def mixed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention and depthwise branch, before what follows the heads: ``(B, N, C)``."""
        q, k, v = self.projected(x)
        grid, prefix = self.grid_of(x), self.num_prefix_tokens
        if not prefix and self.takes_kernel(*self.heads(q, k, v)):  # one operator for both branches
            return self.linear(q, k, v, grid, mask, self.kernels())
        v = v if mask is None else v.masked_fill(~mask[..., None], 0)
        local = depthwise_tokens(v[:, prefix:], grid, self.dwc.weight, self.dwc.bias)
        return self.linear(q, k, v, grid, mask) + F.pad(local, (0, 0, prefix, 0))

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        mask: Tensor | None = None,
        kernels: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """The linear product of tokens ``(B, N, C)``, to the same; ``kernels`` as for :meth:`attend`."""
        q, k, v = self.heads(q, k, v)
        out = self.attend(q, k, v, grid, mask, kernels, native=self.takes_kernel(q, k, v))
        return out.transpose(1, 2).flatten(2)

    def kernels(self) -> tuple[Tensor, Tensor | None]:
        """The depthwise branch's kernels, ``(num_heads, D, K, K)``, and biases, as :meth:`attend` takes them."""
        weight, bias = self.dwc.weight[:, 0], self.dwc.bias
        return weight.unflatten(0, (self.num_heads, -1)), None if bias is None else bias.view(self.num_heads, -1)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``(B, N, C)``."""
        outputs = [self.get_submodule(name)(x) for name in self._projections]
        return outputs[0].chunk(3, dim=-1) if len(outputs) == 1 else tuple(outputs)

    def grid_of(self, x: Tensor) -> Grid:
        """Grid of the patch tokens in ``x``."""
        return resolve_grid(x.shape[1] - self.num_prefix_tokens, None, self.grid_size)

    def table(self, key_grid: Grid) -> Tensor:
        """Position table of prefix and patch tokens, ``(1, num_heads, P + M, D)``."""
        patches = super().table(key_grid)
        own = self.prefix_encoding
        return patches if own is None else torch.cat([self.split(own), patches], dim=2)

    def extra_repr(self) -> str:
        """Width, heads, grid and prefix tokens."""
        return f"{super().extra_repr()}, num_prefix_tokens={self.num_prefix_tokens}"
