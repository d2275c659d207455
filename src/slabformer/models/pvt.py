"""PVT without LayerNorm (``pvt_*_prepbn``), and with linear attention on top (``slab_pvt_*``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import Mlp, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from slabformer.models.pyramid import PyramidTransformer
from slabformer.models.registry import cfg, create
from slabformer.models.stages import (
    Block,
    ConvEmbed,
    ConvMerge,
    PVTStage,
    Stage,
    check_attention,
    check_heads,
    drop_path_rates,
    grid_sizes,
)
from slabformer.models.weights.official import PublishedLayout
from slabformer.nn.attention_variants import PyramidAttention, PyramidLinearAttention, Resize
from slabformer.nn.norms import NormLayer, resolve_norm_layer
from slabformer.nn.resample import Grid
from slabformer.settings import Eta, FractionBelowOne, ImageSize, PositiveFloat, PositiveInt, checked


class PVT(PyramidTransformer):
    """Pyramid Vision Transformer (Wang et al. 2021) with a choice of norm and attention, without class token.

    Blocks are followed by the mean over tokens and the head; there is no final norm. Images are padded so that every
    reduction divides the map it reduces.

    Args:
        attention: One letter a stage, S or L.
        norm: Name of a norm in the table (:mod:`slabformer.nn.norms`), such as "prepbn" or "layernorm"; or a
            constructor.
        norm_eps: LayerNorm's and RMSNorm's epsilon.
        eta: Initial skip weight of PRepBN and RepBN, a number or "published" (1); 0 by default.
        img_size: That position tables are made for; others are resampled to.
        in_chans: Channels of the images.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden channels of the MLPs, as multiples of ``embed_dims``.
        sr_ratios: Reduction of keys and values where a stage is S.
        linear_sr_ratios: The same where it is L.
        resize: How reduced values are stretched for the depthwise branch of L, see :class:`PyramidLinearAttention`.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_drop_rate: Dropout after projections and inside MLPs.
        attn_drop_rate: Dropout of attention weights; there are none where a stage is L.
        drop_path_rate: Stochastic depth of the last block.
        kwargs: As :class:`PyramidTransformer` takes them: ``num_classes``, ``global_pool``, ``drop_rate``.

    Raises:
        ValueError: If a plan or a list has not one entry a stage, or an argument is none of its values.
    """

    published_layout = PublishedLayout(
        renames=(
            (r"^patch_embed\.", "patch_embed1."),
            *((rf"^stages\.{i}\.pos_embed$", f"pos_embed{i + 1}") for i in range(4)),
            *((rf"^stages\.{i}\.downsample\.", f"patch_embed{i + 1}.") for i in range(4)),
            *((rf"^stages\.{i}\.blocks\.", f"block{i + 1}.") for i in range(4)),
        ),
        # in the files, the tables of all stages come first
        complete=lambda _, state: dict(sorted(state.items(), key=lambda item: not item[0].startswith("pos_embed"))),
    )
    #: kernel size, stride and padding of the first patch embedding, and of those between stages
    stem, merge = (4, 4, 0), (2, 2, 0)
    mlp_layer: type[nn.Module] = Mlp

    @checked
    def __init__(
        self,
        attention: str = "LLLL",
        norm: str | NormLayer = "prepbn",
        norm_eps: PositiveFloat = 1e-6,
        *,
        eta: Eta | None = None,
        img_size: ImageSize = 224,
        in_chans: PositiveInt = 3,
        embed_dims: Sequence[PositiveInt] = (64, 128, 320, 512),
        depths: Sequence[PositiveInt] = (2, 2, 2, 2),
        num_heads: Sequence[PositiveInt] = (1, 2, 5, 8),
        mlp_ratios: Sequence[PositiveFloat] = (8, 8, 4, 4),
        sr_ratios: Sequence[PositiveInt] = (8, 4, 2, 1),
        linear_sr_ratios: Sequence[PositiveInt] = (1, 1, 1, 1),
        resize: Resize = "2d",
        qkv_bias: bool = True,
        proj_drop_rate: FractionBelowOne = 0.0,
        attn_drop_rate: FractionBelowOne = 0.0,
        drop_path_rate: FractionBelowOne = 0.0,
        **kwargs: Any,
    ) -> None:
        check_attention(attention, len(depths))
        _check_lengths(
            len(depths),
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            linear_sr_ratios=linear_sr_ratios,
        )
        check_heads(embed_dims, num_heads)
        norm_layer = resolve_norm_layer(norm, norm_eps, eta)
        reductions = [(sr_ratios if letter == "S" else linear_sr_ratios)[i] for i, letter in enumerate(attention)]
        strides = [4 * 2**i for i in range(len(depths))]
        pad_to = math.lcm(strides[-1], *(stride * r for stride, r in zip(strides, reductions, strict=True)))
        grids = grid_sizes(to_2tuple(img_size), strides, pad_to)
        rates = drop_path_rates(drop_path_rate, depths)
        options: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        stages = []
        for i, (letter, dim, grid) in enumerate(zip(attention, embed_dims, grids, strict=True)):
            linear = partial(PyramidLinearAttention, grid_size=grid, resize=resize)
            attn_layer: Callable[..., nn.Module] = linear if letter == "L" else PyramidAttention
            attn = partial(attn_layer, dim, num_heads[i], reductions[i], norm_layer=norm_layer, **options)
            block = partial(Block, dim, norm_layer=norm_layer, mlp_ratio=mlp_ratios[i], mlp_layer=self.mlp_layer)
            blocks = [block(attn(), drop_path=rate, proj_drop=proj_drop_rate) for rate in rates[i]]
            merge = ConvMerge(embed_dims[i - 1], dim, *self.merge, norm_layer) if i else None
            stages.append(self.make_stage(blocks, merge, dim, grid, norm_layer))
        super().__init__(
            ConvEmbed(in_chans, embed_dims[0], *self.stem, norm_layer),
            stages,
            nn.Identity(),
            attention=attention,
            embed_dims=embed_dims,
            strides=strides,
            pad_to=pad_to,
            img_size=img_size,
            **kwargs,
        )

    @staticmethod
    def make_stage(
        blocks: Sequence[nn.Module], merge: nn.Module | None, dim: int, grid_size: Grid, norm_layer: NormLayer
    ) -> Stage:
        """Blocks and what stands around them."""
        return PVTStage(blocks, merge, dim, grid_size)


def _check_lengths(num_stages: int, **lists: Sequence[float]) -> None:
    for name, values in lists.items():
        if len(values) != num_stages:
            raise ValueError(f"{name} needs one value for each of {num_stages} stages, got {tuple(values)}")


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 2, 2)},
    "small": {"depths": (3, 4, 6, 3)},
    "medium": {"depths": (3, 4, 18, 3)},
    "large": {"depths": (3, 8, 27, 3)},
}
_LAYERNORM = {"attention": "SSSS", "norm": "layernorm"}
_SOFTMAX = {"attention": "SSSS"}
_PREPBN_SIZES = ("tiny", "small", "medium")

#: what each of these is held against; timm has no PVT of the first version
layernorm_baselines = {f"pvt_{size}_prepbn": f"pvt_{size}" for size in _PREPBN_SIZES}
layernorm_baselines |= {f"slab_pvt_{size}": f"pvt_{size}" for size in _SIZES}
_CFGS: dict[str, Any] = {name: cfg(name) for name in (*layernorm_baselines, *(f"pvt_{size}" for size in _SIZES))}
default_cfgs = generate_default_cfgs(_CFGS)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny with LayerNorm and softmax attention."""
    return create(PVT, "pvt_tiny", pretrained, _SIZES["tiny"] | _LAYERNORM, **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Small with LayerNorm and softmax attention."""
    return create(PVT, "pvt_small", pretrained, _SIZES["small"] | _LAYERNORM, **kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Medium with LayerNorm and softmax attention."""
    return create(PVT, "pvt_medium", pretrained, _SIZES["medium"] | _LAYERNORM, **kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Large with LayerNorm and softmax attention."""
    return create(PVT, "pvt_large", pretrained, _SIZES["large"] | _LAYERNORM, **kwargs)


@register_model
def pvt_tiny_prepbn(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny with PRepBN."""
    return create(PVT, "pvt_tiny_prepbn", pretrained, _SIZES["tiny"] | _SOFTMAX, **kwargs)


@register_model
def pvt_small_prepbn(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Small with PRepBN."""
    return create(PVT, "pvt_small_prepbn", pretrained, _SIZES["small"] | _SOFTMAX, **kwargs)


@register_model
def pvt_medium_prepbn(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Medium with PRepBN."""
    return create(PVT, "pvt_medium_prepbn", pretrained, _SIZES["medium"] | _SOFTMAX, **kwargs)


@register_model
def slab_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny with PRepBN and linear attention."""
    return create(PVT, "slab_pvt_tiny", pretrained, _SIZES["tiny"], **kwargs)


@register_model
def slab_pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Small with PRepBN and linear attention."""
    return create(PVT, "slab_pvt_small", pretrained, _SIZES["small"], **kwargs)


@register_model
def slab_pvt_medium(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Medium with PRepBN and linear attention."""
    return create(PVT, "slab_pvt_medium", pretrained, _SIZES["medium"], **kwargs)


@register_model
def slab_pvt_large(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Large with PRepBN and linear attention."""
    return create(PVT, "slab_pvt_large", pretrained, _SIZES["large"], **kwargs)
