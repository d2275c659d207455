"""Linear attention in the place of a softmax attention whose projections it keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.attention import LinearAttentionCore, check_odd, key_mask
from slabformer.nn.resample import Grid, resolve_grid
from slabformer.ops.depthwise import depthwise_tokens
from slabformer.settings import NonNegativeInt, PositiveInt, checked

#: how rotary embeddings pair channels: the first half with the second, or neighbours
Rotary = Literal["half", "interleaved"]
#: what queries of prefix tokens attend by
PrefixAttention = Literal["softmax", "linear"]


class Place(NamedTuple):
    """Where tokens are.

    Attributes:
        grid: Of the patch tokens.
        rotation: Cosines and sines of the rotary embedding, each broadcast with ``(B, num_heads, M, D)`` of the patch
            tokens.
    """

    grid: Grid
    rotation: tuple[Tensor, Tensor] | None = None


class ConvertedLinearAttention(LinearAttentionCore):
    """``out(relu(q) (relu(k + table)^T v) / normaliser + DWC(v))`` on an attention's projections (Guo et al. 2024).

    Prefix tokens (class and register tokens) attend by softmax, as they did: ``P`` queries over ``N`` keys are linear
    in ``N`` too, and a class token may be all that a head reads. They are attended to like all others. The depthwise
    branch runs on the patch tokens alone. It has a kernel for each channel, where the paper's heads share theirs: what
    heads of a trained model look at differs too much (docs/log.md). Projections keep their names, so that files of the
    original model load.

    Norms of queries and keys come before the ReLU, and so do rotary embeddings, which turn patch tokens as they did.
    A bias of relative positions is a factor ``exp(b(i - j))`` in softmax, which a product of features does not have.
    The depthwise branch, a kernel over the same offsets, stands for it as far as it reaches, and the table for what
    depends on the key alone. Of decomposed relative positions (SAM), whose bias depends on the query too, that is the
    mean over queries.

    Args:
        projections: Of queries, keys and values, by their names: one Linear of all three, or three.
        out: What follows the heads, by its names, in order; takes ``(B, N, C)``.
        num_heads: Heads of ``D = C / num_heads`` channels.
        grid_size: Grid ``(H, W)`` of the patch tokens that the position table is made for; others are resampled.
        num_prefix_tokens: Tokens in front of the patches, which have entries of their own in the table.
        prefix_attention: "softmax", or "linear" for prefix tokens like all others.
        kernel_size: Of the depthwise convolution, odd.
        returns_weights: Whether the forward returns ``(output, None)``, where transformers' attentions return the
            attention matrix.
        norms: Of the heads of queries and keys, by their names: ``q_norm`` and ``k_norm``.
        biases: Of queries and values by their names, ``q_bias`` and ``v_bias``, where they are not the projection's.
        rotary: How rotary embeddings pair channels, where the model passes them.
        ignored: Further arguments of the forward that hold biases of positions.

    Shape:
        ``(B, N, C)``, or ``(B, H, W, C)`` without prefix tokens, to the same.

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
        prefix_attention: PrefixAttention = "softmax",
        kernel_size: PositiveInt = 5,
        returns_weights: bool = False,
        norms: Mapping[str, nn.Module] | None = None,
        biases: Mapping[str, nn.Parameter] | None = None,
        rotary: Rotary | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        first = next(iter(projections.values()))
        factory: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
        dim = first.out_features * len(projections) // 3
        super().__init__(dim, num_heads, grid_size=grid_size, **factory)
        self.prefix_encoding: nn.Parameter | None
        self.num_prefix_tokens, self.returns_weights = num_prefix_tokens, returns_weights
        self.prefix_attention: PrefixAttention = prefix_attention
        self.rotary, self.ignored = rotary, frozenset(ignored)
        own = nn.Parameter(torch.zeros(1, num_prefix_tokens, dim, **factory)) if num_prefix_tokens else None
        self.register_parameter("prefix_encoding", own)  # an empty one would be a parameter without a gradient
        self._projections, self._out, self._norms = tuple(projections), tuple(out), tuple(norms or {})
        self._biases = tuple(biases or {})
        for name, module in {**projections, **(norms or {}), **out}.items():
            self.add_module(name, module)
        for name, bias in (biases or {}).items():
            self.register_parameter(name, bias)
        check_odd(kernel_size)
        self.dwc = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory)
        nn.init.zeros_(self.dwc.weight)
        assert self.dwc.bias is not None
        nn.init.zeros_(self.dwc.bias)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """As the attention that it replaces; masks are valid keys, boolean ``(B, N)`` or ``(B, 1, 1, N)``."""
        given = {"attention_mask": attention_mask} | kwargs
        place = self.place_of(hidden_states, given)
        given = {
            name: value
            for name, value in given.items()
            if name not in self.ignored and value is not None and value is not False
        }
        masks = [given.pop(name) for name in ("attention_mask", "attn_mask") if name in given]
        asked = [name for name in given if self.rotary is None or name not in ROTATIONS]
        if asked:
            raise ValueError(f"linear attention takes tokens and a mask of keys, got {', '.join(asked)}")
        maps = hidden_states.shape[1:-1]
        x = hidden_states.flatten(1, -2)
        x = self.outgoing(self.mixed(x, key_mask(masks[0] if masks else None), place))
        x = x.unflatten(1, maps)
        return (x, None) if self.returns_weights else x

    def place_of(self, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> Place:
        """Where the tokens of a call are: on the map, the grid of the table, or a square; turned as ``kwargs`` say."""
        if hidden_states.ndim == 4:
            grid: Grid = (hidden_states.shape[1], hidden_states.shape[2])
        else:
            grid = self.grid_of(hidden_states)
        return Place(grid, rotation_of(kwargs) if self.rotary is not None else None)

    def mixed(self, x: Tensor, mask: Tensor | None = None, place: Place | None = None) -> Tensor:
        """Attention and depthwise branch of tokens, before what follows the heads: ``(B, N, C)``."""
        place, prefix = place or Place(self.grid_of(x)), self.num_prefix_tokens
        q, k, v = self.projected(x, place)
        if not prefix and self.takes_kernel(*self.heads(q, k, v)):  # one operator for both branches
            return self.linear(q, k, v, place.grid, mask, self.kernels())
        v = v if mask is None else v.masked_fill(~mask[..., None], 0)
        local = depthwise_tokens(v[:, prefix:], place.grid, self.dwc.weight, self.dwc.bias)
        return self.linear(q, k, v, place.grid, mask) + F.pad(local, (0, 0, prefix, 0))

    def outgoing(self, x: Tensor) -> Tensor:
        """What follows the heads, of ``(B, N, C)``."""
        for name in self._out:
            x = self.get_submodule(name)(x)
        return x

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        mask: Tensor | None = None,
        kernels: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """Both products of tokens ``(B, N, C)``, to the same; ``kernels`` as for :meth:`attend`."""
        q, k, v = self.heads(q, k, v)
        exact = self.num_prefix_tokens if self.prefix_attention == "softmax" else 0
        out = self.attend(q, k, v, grid, mask, kernels, native=self.takes_kernel(q, k, v))
        if exact:
            valid = None if mask is None else (mask | ~mask.any(1, keepdim=True))[:, None, None]
            first = F.scaled_dot_product_attention(q[:, :, :exact], k, v, valid)
            out = torch.cat([first, out[:, :, exact:]], dim=2)
        return out.transpose(1, 2).flatten(2)

    def kernels(self) -> tuple[Tensor, Tensor | None]:
        """The depthwise branch's kernels, ``(num_heads, D, K, K)``, and biases, as :meth:`attend` takes them."""
        weight, bias = self.dwc.weight[:, 0], self.dwc.bias
        return weight.unflatten(0, (self.num_heads, -1)), None if bias is None else bias.view(self.num_heads, -1)

    def projected(self, x: Tensor, place: Place | None = None) -> tuple[Tensor, ...]:
        """Queries, keys and values ``(B, N, C)``, normed and turned as they enter the product."""
        outputs = [self.get_submodule(name)(x) for name in self._projections]
        q, k, v = outputs[0].chunk(3, dim=-1) if len(outputs) == 1 else outputs
        if self._biases:
            q, v = q + self.get_parameter("q_bias"), v + self.get_parameter("v_bias")
        rotation = None if place is None else place.rotation
        if not self._norms and rotation is None:
            return q, k, v
        q, k = (
            self._turned(self.get_submodule(name)(self.split(each)) if self._norms else self.split(each), rotation)
            for name, each in (("q_norm", q), ("k_norm", k))
        )
        return q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2), v

    def _turned(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Heads ``(B, num_heads, N, D)`` with their patch tokens turned."""
        if rotation is None:
            return x
        assert self.rotary is not None
        prefix = self.num_prefix_tokens
        return torch.cat([x[:, :, :prefix], rotate(x[:, :, prefix:], *rotation, self.rotary)], dim=2)

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
        turned = "" if self.rotary is None else f", rotary={self.rotary!r}"
        by = f", prefix_attention={self.prefix_attention!r}" if self.num_prefix_tokens else ""
        return f"{super().extra_repr()}, num_prefix_tokens={self.num_prefix_tokens}{by}{turned}"


#: arguments that hold a rotary embedding: timm's, sines and cosines side by side, and transformers', cosines and sines
ROTATIONS = ("rope", "position_embeddings")


def rotation_of(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines that an attention was called with; None where there are none."""
    rope, pair = (kwargs.get(name) for name in ROTATIONS)
    if rope is not None:
        sin, cos = rope.chunk(2, dim=-1)
        return cos, sin
    return None if pair is None else (pair[0], pair[1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """Pairs of channels turned by an angle for each token (Su et al. 2021, RoFormer)."""
    if rotary == "half":
        first, second = x.chunk(2, dim=-1)
        other = torch.cat([-second, first], dim=-1)
    else:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + other * sin).to(x.dtype)
