"""CSWin without LayerNorm, its first stages with linear attention (``slab_cswin_*``), and its plain form beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from slabformer.models.pyramid import PyramidTransformer
from slabformer.models.registry import cfg, create
from slabformer.models.stages import (
    Block,
    ConvEmbed,
    ConvMerge,
    Stage,
    check_attention,
    check_heads,
    drop_path_rates,
    grid_sizes,
)
from slabformer.models.weights.official import PublishedLayout, State
from slabformer.nn.norms import NormLayer, resolve_norm_layer
from slabformer.nn.resample import Grid
from slabformer.nn.stripes import StripeAttention, WindowLinearAttention
from slabformer.settings import Eta, FractionBelowOne, ImageSize, PositiveFloat, PositiveInt, checked

NUM_STAGES = 4
#: what published blocks hold, in their order
BLOCK_ORDER = ("qkv", "norm1", "proj", "attns", "mlp", "norm2")


class MapLinearAttention(WindowLinearAttention):
    """:class:`WindowLinearAttention` in one window: the map, of whatever size."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid_size: Grid, window_size: Grid | None = None) -> Tensor:
        """Attention over all tokens on ``grid_size``, or in windows if such are given."""
        return self.inside(q, k, v, grid_size, grid_size if window_size is None else window_size)


class CrossShapedAttention(nn.Module):
    """Attention by branches, each over a share of the channels: stripes across each other, or the whole map.

    Args:
        dim: Channels ``C``.
        branches: Modules ``(q, k, v, grid_size) -> tokens``, each over as many channels.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_drop: Dropout after the output projection.

    Shape:
        ``(B, N, C)`` to the same.
    """

    def __init__(self, dim: int, branches: Sequence[nn.Module], qkv_bias: bool = True, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attns = nn.ModuleList(branches)

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        """Attention over tokens on ``grid_size``."""
        count = len(self.attns)
        shares = self.qkv(x).chunk(3 * count, dim=-1)  # every branch's queries, then their keys, then their values
        out = [
            branch(shares[i], shares[count + i], shares[2 * count + i], grid_size)
            for i, branch in enumerate(self.attns)
        ]
        return self.proj_drop(self.proj(torch.cat(out, -1) if count > 1 else out[0]))

    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample position tables to a new grid for good."""
        for branch in self.attns:
            if isinstance(branch, MapLinearAttention):
                branch.set_grid_size(grid_size)


def branches(letter: str, dim: int, num_heads: int, stripe_width: int | None, grid_size: Grid) -> list[nn.Module]:
    """What a block attends with.

    Raises:
        ValueError: If two branches would have to share a head.
    """
    if letter == "L":
        return [MapLinearAttention(dim, num_heads, grid_size)]
    if stripe_width is None:
        return [StripeAttention(dim, num_heads)]
    if num_heads % 2:
        raise ValueError(
            f"stripes of either direction take half the heads each: num_heads must be even, got {num_heads}"
        )
    return [StripeAttention(dim // 2, num_heads // 2, stripe_width, way) for way in ("vertical", "horizontal")]


def in_published_order(names: Iterable[str]) -> list[str]:
    """Published names in our order to theirs: within a block, the attention's parts lie around the first norm."""
    first_seen: dict[str, int] = {}

    def position(name: str) -> tuple[int, int]:
        part = re.match(r"(stage\d\.\d+)\.(\w+)", name)
        place = first_seen.setdefault(part[1] if part else name, len(first_seen))
        return place, BLOCK_ORDER.index(part[2]) if part else 0

    return sorted(names, key=position)


def complete(model: nn.Module, state: State) -> State:
    """Published order, and the scales that nothing reads."""
    completed: State = {}
    for name in in_published_order(state):
        branch, _, leaf = name.rpartition(".")
        if leaf == "positional_encoding":
            completed[f"{branch}.scale"] = torch.zeros_like(state[name][:, :1])
        completed[name] = state[name]
    return completed


class CSWin(PyramidTransformer):
    """CSWin Transformer (Dong et al. 2022) whose norms have names and whose stages attend as a plan says.

    ``S`` stages attend in stripes as high as the map with one half of the heads, in stripes as wide as the map with the
    other; ``L`` stages attend over the whole map. LePE adds what lies around a token.

    Args:
        attention: One letter a stage: S softmax, L linear.
        depths: Blocks of each stage.
        embed_dim: Channels of the first stage; each next one has twice as many.
        num_heads: Heads of each stage.
        stripe_widths: Of ``S`` stages, in tokens; None for one stripe that is the map. Where stripes do not tile a map,
            its last one is narrower.
        img_size: That position tables are made for; images of any size go.
        in_chans: Channels of the images.
        mlp_ratio: Hidden channels of an MLP, as a multiple of its stage's.
        qkv_bias: Whether queries, keys and values have a bias.
        norm: Name of a norm in the table (:mod:`slabformer.nn.norms`), such as "prepbn" or "layernorm"; or a
            constructor.
        norm_eps: LayerNorm's and RMSNorm's epsilon.
        eta: Initial skip weight of PRepBN and RepBN, a number or "published" (1); 0 by default.
        proj_drop_rate: Dropout after projections and in the MLPs.
        drop_path_rate: Stochastic depth of the last block, rising from 0.
        kwargs: As for :class:`PyramidTransformer`.

    Raises:
        ValueError: If there are not as many letters, heads and widths as depths, or a name or letter is unknown.
    """

    published_layout = PublishedLayout(
        renames=(
            (r"^patch_embed\.proj\b", "stage1_conv_embed.0"),
            (r"^patch_embed\.norm\b", "stage1_conv_embed.2"),
            (r"^(stages\.\d+\.downsample)\.proj\b", r"\1.conv"),
            *((rf"^stages\.{i}\.downsample\b", f"merge{i}") for i in range(1, NUM_STAGES)),
            *((rf"^stages\.{i}\.blocks\.(\d+)\.(?:attn\.)?", rf"stage{i + 1}.\1.") for i in range(NUM_STAGES)),
        ),
        dropped=(r"^stage\d\.\d+\.attns\.0\.scale$",),
        complete=complete,
    )

    @checked
    def __init__(
        self,
        attention: str = "LLSS",
        depths: Sequence[PositiveInt] = (2, 4, 18, 1),
        embed_dim: PositiveInt = 64,
        num_heads: Sequence[PositiveInt] = (2, 4, 8, 16),
        stripe_widths: Sequence[PositiveInt | None] = (1, 2, 7, None),
        *,
        img_size: ImageSize = 224,
        in_chans: PositiveInt = 3,
        mlp_ratio: PositiveFloat = 4.0,
        qkv_bias: bool = True,
        norm: str | NormLayer = "prepbn",
        norm_eps: PositiveFloat = 1e-5,
        eta: Eta | None = None,
        proj_drop_rate: FractionBelowOne = 0.0,
        drop_path_rate: FractionBelowOne = 0.0,
        **kwargs: Any,
    ) -> None:
        check_attention(attention, len(depths))
        for name, values in (("num_heads", num_heads), ("stripe_widths", stripe_widths)):
            if len(values) != len(depths):
                raise ValueError(f"{name} needs one for each of {len(depths)} stages, got {tuple(values)}")
        norm_layer = resolve_norm_layer(norm, norm_eps, eta)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_heads(dims, num_heads)
        strides = [4 * 2**i for i in range(len(depths))]
        grids = grid_sizes(to_2tuple(img_size), strides, strides[-1])
        rates = drop_path_rates(drop_path_rate, depths)

        def block(stage: int, drop_path: float) -> Block:
            dim = dims[stage]
            parts = branches(attention[stage], dim, num_heads[stage], stripe_widths[stage], grids[stage])
            attn = CrossShapedAttention(dim, parts, qkv_bias, proj_drop_rate)
            return Block(dim, attn, norm_layer, mlp_ratio, drop_path=drop_path, proj_drop=proj_drop_rate)

        stages = [
            Stage(
                [block(i, rate) for rate in rates[i]],
                ConvMerge(dims[i - 1], dim, 3, 2, 1, norm_layer) if i else None,
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            ConvEmbed(in_chans, embed_dim, 7, 4, 2, norm_layer),
            stages,
            norm_layer(dims[-1]),
            attention=attention,
            embed_dims=dims,
            strides=strides,
            img_size=img_size,
            **kwargs,
        )


_TINY: dict[str, Any] = {"depths": (2, 4, 18, 1)}
_SMALL: dict[str, Any] = {"depths": (2, 4, 32, 2)}
_PLAIN: dict[str, Any] = {"norm": "layernorm", "attention": "SSSS"}

default_cfgs = generate_default_cfgs(
    {name: cfg(name) for name in ("cswin_tiny", "cswin_small", "slab_cswin_tiny", "slab_cswin_small")}
)

#: what each of these is held against
layernorm_baselines = {"slab_cswin_tiny": "cswin_tiny", "slab_cswin_small": "cswin_small"}


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-T with LayerNorm and softmax attention throughout."""
    return create(CSWin, "cswin_tiny", pretrained, _TINY | _PLAIN, **kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-S with LayerNorm and softmax attention throughout."""
    return create(CSWin, "cswin_small", pretrained, _SMALL | _PLAIN, **kwargs)


@register_model
def slab_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-T with PRepBN and linear attention in the first two stages."""
    return create(CSWin, "slab_cswin_tiny", pretrained, _TINY, **kwargs)


@register_model
def slab_cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-S with PRepBN and linear attention in the first two stages."""
    return create(CSWin, "slab_cswin_small", pretrained, _SMALL, **kwargs)
