"""DeiT without LayerNorm, and with linear attention on top (``slab_deit_*``); built from timm's own parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from slabformer._timm import EmbedsPositions, take_indices
from slabformer.models.arguments import check_ranges
from slabformer.models.registry import cfg, create
from slabformer.models.weights.official import PublishedLayout, State, load_published, read_published
from slabformer.models.weights.pretrained import fit_head, fit_stem, fit_tables
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.norms import NormLayer, resolve_norm_layer
from slabformer.nn.resample import Grid
from slabformer.settings import Eta, ImageSize, PositiveFloat, PositiveInt, checked


class DeiT(EmbedsPositions, VisionTransformer):
    """timm's ``VisionTransformer`` whose norms have names.

    Args:
        norm: Name of a norm in the table (:mod:`slabformer.nn.norms`), such as "prepbn" or "layernorm"; or a
            constructor.
        norm_eps: LayerNorm's and RMSNorm's epsilon.
        eta: Initial skip weight of PRepBN and RepBN, a number or "published" (1); 0 by default.
        img_size: Height and width of images, in pixels.
        patch_size: Height and width of patches, in pixels.
        embed_dim: Channels ``C`` of tokens.
        depth: Blocks.
        num_heads: Heads of ``C / num_heads`` channels.
        kwargs: As timm's.

    Raises:
        ValueError: If an argument is outside of its range, heads do not divide channels, or a patch is larger than the
            image.
    """

    @checked
    def __init__(
        self,
        norm: str | NormLayer = "prepbn",
        norm_eps: PositiveFloat = 1e-6,
        *,
        eta: Eta | None = None,
        img_size: ImageSize = 224,
        patch_size: ImageSize = 16,
        embed_dim: PositiveInt = 768,
        depth: PositiveInt = 12,
        num_heads: PositiveInt = 12,
        **kwargs: Any,
    ) -> None:
        check_ranges(kwargs)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim ({embed_dim}), got {num_heads}")
        if any(side < patch for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True)):
            raise ValueError(f"img_size must be at least patch_size ({patch_size}), got {img_size}")
        sizes: dict[str, Any] = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim}
        kwargs |= sizes | {"depth": depth, "num_heads": num_heads}
        super().__init__(norm_layer=resolve_norm_layer(norm, norm_eps, eta), **kwargs)

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a published file, fitted to this model's head, input channels and image size; timm calls this."""
        state = read_published(checkpoint_path)
        fit_head(state, self.head)
        fit_stem(state, self.patch_embed.proj.in_channels)
        self.fit_tables(state)
        load_published(self, state)

    def fit_tables(self, state: State, names: Mapping[str, str] | None = None) -> None:
        """Resample the position tables of a state dict, made for a square, to this model's size, in place.

        Published names are ours, so that ``names`` as other families take them change nothing.
        """
        side = math.isqrt(state["pos_embed"].shape[1])
        fit_tables(state, (side, side), self.patch_embed.grid_size, self.num_prefix_tokens)


class SlabBlock(Block):
    """timm's pre-norm block around :class:`SimplifiedLinearAttention`, told the grid its tokens lie on.

    A subclass that replaces the attention, since ``attn_layer`` is not in every timm from 1.0.20 on.
    """

    def __init__(self, dim: int, num_heads: int, *, grid_size: Grid, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        names = ("qkv_bias", "proj_bias", "attn_drop", "proj_drop", "device", "dtype")
        taken = {name: kwargs[name] for name in names if name in kwargs}
        self.attn = SimplifiedLinearAttention(dim, num_heads, grid_size=grid_size, **taken)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid_size: Grid | None = None
    ) -> Tensor:
        """``x + attn(norm1(x))``, ``x + mlp(norm2(x))``; ``grid_size`` by default the position table's, or a square."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, grid_size=grid_size)
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SlabDeiT(DeiT):
    """DeiT with linear attention: no class token, final norm, then the mean over tokens, then the head.

    With ``dynamic_img_size=True`` position tables follow the image; :meth:`set_input_size` changes them for good.

    Published files hold a class token that nothing reads; it is dropped.

    Raises:
        ValueError: If tokens are to be dropped or prepended, which leaves no grid for the depthwise branch.
    """

    published_layout = PublishedLayout(
        dropped=("^cls_token$",),
        complete=lambda _, state: {"cls_token": torch.zeros_like(state["pos_embed"][:, :1])} | state,
    )

    @checked
    def __init__(self, img_size: ImageSize = 224, patch_size: ImageSize = 16, **kwargs: Any) -> None:
        for name in ("class_token", "reg_tokens", "patch_drop_rate"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not for slab_deit: its attention needs the whole token grid and no more")
        (H, W), (h, w) = to_2tuple(img_size), to_2tuple(patch_size)
        if h > H or w > W:
            raise ValueError(f"img_size must be at least patch_size ({patch_size}), got {img_size}")
        kwargs = {"global_pool": "avg", "fc_norm": False, **kwargs}
        block = partial(SlabBlock, grid_size=(H // h, W // w))
        super().__init__(img_size=img_size, patch_size=patch_size, class_token=False, block_fn=block, **kwargs)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to normed tokens ``(B, N, C)``."""
        x, grid = self._embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting() and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask, is_causal, grid)
            else:
                x = block(x, attn_mask, is_causal, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's; there are no prefix tokens to return."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        taken, last = take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        features = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, grid, attn_mask, is_causal)
            if index in taken:
                features.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            features = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in features]
        final = None if intermediates_only else self.norm(x)
        if output_dict:
            return {"image_intermediates": features} | ({} if final is None else {"image_features": final})
        return features if final is None else (final, features)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change image or patch size, resampling every position table."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for module in self.modules():
            if isinstance(module, SimplifiedLinearAttention):
                module.set_grid_size(self.patch_embed.grid_size)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        return self.norm_pre(self.embed_positions(x)), grid

    def _run(self, block: nn.Module, x: Tensor, grid: Grid, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, attn_mask, is_causal, grid)
        return block(x, attn_mask, is_causal, grid)


_FIXED: dict[str, Any] = {"fixed_input_size": True, "pool_size": None}
_MICRO_CFG: dict[str, Any] = _FIXED | {"num_classes": 10, "input_size": (3, 32, 32)}
_CFGS: dict[str, Any] = {
    "deit_tiny_prepbn": cfg("deit_tiny_prepbn", **_FIXED),
    "deit_small_prepbn": cfg("deit_small_prepbn", **_FIXED),
    "slab_deit_tiny": cfg("slab_deit_tiny", **_FIXED),
    "slab_deit_small": cfg("slab_deit_small", **_FIXED),
    "deit_micro": cfg("deit_micro", **_MICRO_CFG),
    "deit_micro_prepbn": cfg("deit_micro_prepbn", **_MICRO_CFG),
    "slab_deit_micro": cfg("slab_deit_micro", **_MICRO_CFG),
}
default_cfgs = generate_default_cfgs(_CFGS)

_TINY: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "out_indices": 3}
_SMALL: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "out_indices": 3}
_MICRO: dict[str, Any] = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "out_indices": 3}

#: what each of these is held against
layernorm_baselines = {
    "deit_tiny_prepbn": "deit_tiny_patch16_224",
    "deit_small_prepbn": "deit_small_patch16_224",
    "slab_deit_tiny": "deit_tiny_patch16_224",
    "slab_deit_small": "deit_small_patch16_224",
    "deit_micro_prepbn": "deit_micro",
    "slab_deit_micro": "deit_micro",
}


@register_model
def deit_tiny_prepbn(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """DeiT-Tiny with PRepBN; the published one was trained with RepBN from the start (``norm="repbn"``)."""
    return create(DeiT, "deit_tiny_prepbn", pretrained, _TINY, **kwargs)


@register_model
def deit_small_prepbn(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """DeiT-Small with PRepBN."""
    return create(DeiT, "deit_small_prepbn", pretrained, _SMALL, **kwargs)


@register_model
def slab_deit_tiny(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """DeiT-Tiny with PRepBN and linear attention."""
    return create(SlabDeiT, "slab_deit_tiny", pretrained, _TINY, **kwargs)


@register_model
def slab_deit_small(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """DeiT-Small with PRepBN and linear attention."""
    return create(SlabDeiT, "slab_deit_small", pretrained, _SMALL, **kwargs)


@register_model
def deit_micro(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """LayerNorm and softmax for 32x32 pixels: the baseline that :func:`slab_deit_micro` is held against."""
    return create(DeiT, "deit_micro", pretrained, _MICRO | {"norm": "layernorm"}, **kwargs)


@register_model
def deit_micro_prepbn(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """:func:`deit_micro` with PRepBN."""
    return create(DeiT, "deit_micro_prepbn", pretrained, _MICRO, **kwargs)


@register_model
def slab_deit_micro(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """PRepBN and linear attention for 32x32 pixels: small enough for tests and the quickstart."""
    return create(SlabDeiT, "slab_deit_micro", pretrained, _MICRO, **kwargs)
