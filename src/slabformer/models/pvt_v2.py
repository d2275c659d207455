"""PVTv2 with PRepBN and linear attention (``slab_pvt_v2_*``); timm has the LayerNorm ones, whose weights fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from slabformer.models.pvt import PVT
from slabformer.models.registry import cfg, create
from slabformer.models.stages import Stage
from slabformer.nn.norms import NormLayer
from slabformer.nn.resample import Grid


class MapMlp(MlpWithDepthwiseConv):
    """timm's MLP with a depthwise 3x3 convolution before its activation, on maps ``(B, H, W, C)``."""

    # timm's takes tokens and their grid
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, H, W, C)`` to the same."""
        maps = self.relu(self.fc1(x).permute(0, 3, 1, 2))
        x = self.drop(self.act(self.dwconv(maps).permute(0, 2, 3, 1)))
        return self.drop(self.fc2(x))


class NormedStage(Stage):
    """A stage that ends in a norm.

    Args:
        norm: Of its maps.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, norm: nn.Module) -> None:
        super().__init__(blocks, downsample)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Maps through the stage."""
        return self.norm(self.run(x))


class PVTv2(PVT):
    """PVT whose patches overlap, whose MLPs convolve, whose stages end in a norm (Wang et al. 2022).

    There is no position table. With ``attention="SSSS", norm="layernorm"`` names and outputs are those of timm's
    ``pvt_v2_*``. Args and errors as :class:`PVT`.
    """

    published_layout = replace(
        PVT.published_layout,
        renames=(
            *PVT.published_layout.renames,
            *((rf"^stages\.{i}\.norm\.", f"norm{i + 1}.") for i in range(4)),
            (r"\.dwconv\.", ".dwconv.dwconv."),
        ),
    )
    stem, merge = (7, 4, 3), (3, 2, 1)
    mlp_layer = MapMlp

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.apply(_init_conv)

    @staticmethod
    def make_stage(
        blocks: Sequence[nn.Module], merge: nn.Module | None, dim: int, grid_size: Grid, norm_layer: NormLayer
    ) -> Stage:
        """Blocks and what stands around them."""
        return NormedStage(blocks, merge, norm_layer(dim))


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SIZES: dict[str, dict[str, Any]] = {
    "b0": {"depths": (2, 2, 2, 2), "embed_dims": (32, 64, 160, 256)},
    "b1": {"depths": (2, 2, 2, 2)},
    "b2": {"depths": (3, 4, 6, 3)},
    "b3": {"depths": (3, 4, 18, 3)},
    "b4": {"depths": (3, 8, 27, 3)},
    "b5": {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)},
}

#: what each of these is held against
layernorm_baselines = {f"slab_pvt_v2_{size}": f"pvt_v2_{size}" for size in _SIZES}
default_cfgs = generate_default_cfgs({name: cfg(name) for name in layernorm_baselines})


@register_model
def slab_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> PVTv2:
    """PVTv2-B0 with PRepBN and linear attention."""
    return create(PVTv2, "slab_pvt_v2_b0", pretrained, _SIZES["b0"], **kwargs)


@register_model
def slab_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> PVTv2:
    """PVTv2-B1 with PRepBN and linear attention."""
    return create(PVTv2, "slab_pvt_v2_b1", pretrained, _SIZES["b1"], **kwargs)


@register_model
def slab_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> PVTv2:
    """PVTv2-B2 with PRepBN and linear attention."""
    return create(PVTv2, "slab_pvt_v2_b2", pretrained, _SIZES["b2"], **kwargs)


@register_model
def slab_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> PVTv2:
    """PVTv2-B3 with PRepBN and linear attention."""
    return create(PVTv2, "slab_pvt_v2_b3", pretrained, _SIZES["b3"], **kwargs)


@register_model
def slab_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> PVTv2:
    """PVTv2-B4 with PRepBN and linear attention."""
    return create(PVTv2, "slab_pvt_v2_b4", pretrained, _SIZES["b4"], **kwargs)


@register_model
def slab_pvt_v2_b5(pretrained: bool = False, **kwargs: Any) -> PVTv2:
    """PVTv2-B5 with PRepBN and linear attention."""
    return create(PVTv2, "slab_pvt_v2_b5", pretrained, _SIZES["b5"], **kwargs)
