"""Swin without LayerNorm (``swin_*_prepbn``), and with linear attention in its first stages (``slab_swin_*``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from slabformer.models.pyramid import PyramidTransformer
from slabformer.models.registry import cfg, create
from slabformer.models.stages import Block, ConvEmbed, Stage, check_attention, check_heads, drop_path_rates, grid_sizes
from slabformer.models.weights.official import PublishedLayout, State
from slabformer.nn.attention import SimplifiedLinearAttention, refuse_attn_drop
from slabformer.nn.norms import NormLayer, resolve_norm_layer
from slabformer.nn.resample import Grid
from slabformer.nn.shifted_windows import (
    ShiftedWindowAttention,
    ShiftedWindowLinearAttention,
    relative_position_index,
    resample_bias_table,
)
from slabformer.settings import Eta, FractionBelowOne, ImageSize, PositiveFloat, PositiveInt, checked

BIAS_TABLE = "relative_position_bias_table"
#: of the published models
PUBLISHED_WINDOW = (7, 7)
PUBLISHED_OFFSETS = (2 * PUBLISHED_WINDOW[0] - 1) * (2 * PUBLISHED_WINDOW[1] - 1)


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the channels: concatenated, normed, projected without bias.

    Args:
        dim: Channels ``C``.
        norm_layer: Constructor of the norm.

    Shape:
        ``(B, H, W, C)`` with even ``H`` and ``W`` to ``(B, H / 2, W / 2, 2 * C)``.
    """

    def __init__(self, dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps of half the side; neighbours come column by column."""
        squares = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H / 2, 2, W / 2, 2, C)
        return self.reduction(self.norm(squares.permute(0, 1, 3, 4, 2, 5).flatten(3)))


def put_back(model: nn.Module, state: State) -> State:
    """``state`` with the index of every bias table and the mask of every shifted block, as published."""
    assert isinstance(model, Swin)
    masks = {f"layers.{i}.blocks.{j}": attn.mask for i, j, attn in model.softmax_attentions()}
    whole: State = {}
    for name, value in state.items():
        block = ".".join(name.split(".", 4)[:4])
        mask = masks.pop(block, None)
        if mask is not None:
            whole[f"{block}.attn_mask"] = mask.float()
        whole[name] = value
        if name.endswith(BIAS_TABLE):
            index = relative_position_index(model.window_size, model.window_size, value.device)
            whole[name.replace("_bias_table", "_index")] = index
    return whole


class Swin(PyramidTransformer):
    """Swin Transformer (Liu et al. 2021) whose norms have names and whose stages attend as a plan says.

    ``S`` stages attend inside windows, shifted in every other block: a map that is no multiple of the window is padded,
    then rolled and masked, as published; windows shrink to smaller maps. ``L`` stages attend over the whole map.

    Args:
        attention: One letter a stage: S softmax, L linear.
        depths: Blocks of each stage.
        embed_dim: Channels of the first stage; each next one has twice as many.
        num_heads: Heads of each stage.
        img_size: That position tables are made for; images of any size go.
        patch_size: Pixels to a token of the first stage, on either axis.
        window_size: Of ``S`` stages.
        fixed_windows: As published for detection: windows of ``L`` stages are as large as their maps at ``img_size``
            and neither grow nor shrink, and every other block is shifted whatever its map.
        in_chans: Channels of the images.
        mlp_ratio: Hidden channels of an MLP, as a multiple of its stage's.
        qkv_bias: Whether queries, keys and values have a bias.
        norm: Name of a norm in the table (:mod:`slabformer.nn.norms`), such as "prepbn" or "layernorm"; or a
            constructor.
        norm_eps: LayerNorm's and RMSNorm's epsilon.
        eta: Initial skip weight of PRepBN and RepBN, a number or "published" (1); 0 by default.
        proj_drop_rate: Dropout after projections and in the MLPs.
        attn_drop_rate: Dropout of softmax weights.
        drop_path_rate: Stochastic depth of the last block, rising from 0.
        kwargs: As for :class:`PyramidTransformer`.

    Raises:
        ValueError: If plan, depths and heads are not of one length, or a letter, a norm or a rate is not to be had.
    """

    published_layout = PublishedLayout(
        renames=(
            # merging ends a stage there, and starts the next one here
            *((rf"^stages\.{i + 1}\.downsample\b", f"layers.{i}.downsample") for i in range(3)),
            (r"^stages\b", "layers"),
        ),
        dropped=(r"\.relative_position_index$", r"\.attn_mask$"),
        complete=put_back,
    )

    @checked
    def __init__(
        self,
        attention: str = "LLSS",
        depths: Sequence[PositiveInt] = (2, 2, 6, 2),
        embed_dim: PositiveInt = 96,
        num_heads: Sequence[PositiveInt] = (3, 6, 12, 24),
        *,
        img_size: ImageSize = 224,
        patch_size: PositiveInt = 4,
        window_size: PositiveInt | tuple[PositiveInt, PositiveInt] = PUBLISHED_WINDOW,
        fixed_windows: bool = False,
        in_chans: PositiveInt = 3,
        mlp_ratio: PositiveFloat = 4.0,
        qkv_bias: bool = True,
        norm: str | NormLayer = "prepbn",
        norm_eps: PositiveFloat = 1e-5,
        eta: Eta | None = None,
        proj_drop_rate: FractionBelowOne = 0.0,
        attn_drop_rate: FractionBelowOne = 0.0,
        drop_path_rate: FractionBelowOne = 0.0,
        **kwargs: Any,
    ) -> None:
        check_attention(attention, len(depths))
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads needs a number for each of {len(depths)} stages, got {tuple(num_heads)}")
        if "S" not in attention:
            refuse_attn_drop(attn_drop_rate)
        norm_layer = resolve_norm_layer(norm, norm_eps, eta)
        window = to_2tuple(window_size)
        dims, strides = ([first * 2**i for i in range(len(depths))] for first in (embed_dim, patch_size))
        check_heads(dims, num_heads)
        grids = grid_sizes(to_2tuple(img_size), strides, strides[-1])
        rates = drop_path_rates(drop_path_rate, depths)
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}

        def block(i: int, j: int) -> Block:
            shares = {"window": window, "odd": j % 2 == 1, "fixed": fixed_windows, "qkv_bias": qkv_bias, **drops}
            attn = stage_attention(attention[i], dims[i], num_heads[i], grids[i], **shares)
            return Block(dims[i], attn, norm_layer, mlp_ratio, drop_path=rates[i][j], proj_drop=proj_drop_rate)

        stages = [
            Stage([block(i, j) for j in range(depth)], PatchMerging(dims[i - 1], norm_layer) if i else None)
            for i, depth in enumerate(depths)
        ]
        super().__init__(
            ConvEmbed(in_chans, embed_dim, patch_size, patch_size, 0, norm_layer),
            stages,
            norm_layer(dims[-1]),
            attention=attention,
            embed_dims=dims,
            strides=strides,
            img_size=img_size,
            **kwargs,
        )
        self.window_size = window

    def softmax_attentions(self) -> Iterator[tuple[int, int, ShiftedWindowAttention]]:
        """Stage, block and module of every softmax attention."""
        for i, stage in enumerate(self._each_stage()):
            for j, block in enumerate(stage.blocks):
                if isinstance(block.attn, ShiftedWindowAttention):
                    yield i, j, block.attn

    def no_weight_decay(self) -> set[str]:
        """Relative position tables; tables of linear attention are decayed, as published."""
        return {name for name, _ in self.named_parameters() if name.endswith(BIAS_TABLE)}

    def fit_tables(self, state: State, names: Mapping[str, str | None] | None = None) -> None:
        """Resample tables made for a square and for 7x7 windows to this model's, in place."""
        super().fit_tables(state, names)
        for name, table in state.items():
            if name.endswith(BIAS_TABLE) and len(table) == PUBLISHED_OFFSETS and self.window_size != PUBLISHED_WINDOW:
                state[name] = resample_bias_table(table, PUBLISHED_WINDOW, self.window_size)


def stage_attention(
    letter: str, dim: int, num_heads: int, grid: Grid, *, window: Grid, odd: bool, fixed: bool, **kwargs: Any
) -> nn.Module:
    """Attention of one block: ``letter`` over maps of ``grid``; shifted if its number is ``odd``."""
    size = grid if letter == "L" else window
    shift = (size[0] // 2, size[1] // 2) if odd else (0, 0)
    if letter == "S":
        return ShiftedWindowAttention(dim, num_heads, size, shift, grid_size=grid, fixed=fixed, **kwargs)
    linear = {**kwargs, "attn_drop": 0.0}  # of the softmax stages beside
    if fixed:
        return ShiftedWindowLinearAttention(dim, num_heads, size, shift, **linear)
    return SimplifiedLinearAttention(dim, num_heads, grid_size=grid, **linear)


_NAMES = ("swin_tiny_prepbn", "swin_small_prepbn", "slab_swin_tiny", "slab_swin_small", "slab_swin_base")
_CFGS: dict[str, Any] = {name: cfg(name) for name in _NAMES}
default_cfgs = generate_default_cfgs(_CFGS)

_TINY: dict[str, Any] = {"depths": (2, 2, 6, 2), "embed_dim": 96, "num_heads": (3, 6, 12, 24)}
_SMALL: dict[str, Any] = _TINY | {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"depths": (2, 2, 18, 2), "embed_dim": 128, "num_heads": (4, 8, 16, 32)}

#: what each of these is held against
layernorm_baselines = {
    "swin_tiny_prepbn": "swin_tiny_patch4_window7_224",
    "swin_small_prepbn": "swin_small_patch4_window7_224",
    "slab_swin_tiny": "swin_tiny_patch4_window7_224",
    "slab_swin_small": "swin_small_patch4_window7_224",
    "slab_swin_base": "swin_base_patch4_window7_224",
}


@register_model
def swin_tiny_prepbn(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-T with PRepBN; the published one was trained with RepBN from the start (``norm="repbn"``)."""
    return create(Swin, "swin_tiny_prepbn", pretrained, _TINY | {"attention": "SSSS"}, **kwargs)


@register_model
def swin_small_prepbn(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-S with PRepBN: a backbone for detection; published without weights for classification."""
    return create(Swin, "swin_small_prepbn", pretrained, _SMALL | {"attention": "SSSS"}, **kwargs)


@register_model
def slab_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-T with PRepBN, and linear attention in its first two stages."""
    return create(Swin, "slab_swin_tiny", pretrained, _TINY, **kwargs)


@register_model
def slab_swin_small(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-S with PRepBN, and linear attention in its first two stages."""
    return create(Swin, "slab_swin_small", pretrained, _SMALL, **kwargs)


@register_model
def slab_swin_base(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-B with PRepBN, and linear attention in its first two stages."""
    return create(Swin, "slab_swin_base", pretrained, _BASE, **kwargs)
