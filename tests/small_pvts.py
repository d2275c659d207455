"""PVTs and PVTv2s small enough for tests, with random norms and tables, and what they are tried with."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fusing import ready

SMALL: dict[str, Any] = {
    "img_size": 64,
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "num_classes": 5,
}
V1, V2 = "slab_pvt_tiny", "slab_pvt_v2_b0"
#: a model of every kind: its name and arguments
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "slab_pvt": (V1, {}),
    "pvt_prepbn": ("pvt_tiny_prepbn", {}),
    "pvt": ("pvt_tiny", {}),
    "mixed": (V1, {"attention": "LSLS", "norm": "repbn"}),
    "reduced": (V1, {"linear_sr_ratios": (8, 4, 2, 1)}),
    "slab_pvt_v2": (V2, {}),
    "pvt_v2_mixed": (V2, {"attention": "SSLL"}),
}
kinds = pytest.mark.parametrize(("name", "kwargs"), KINDS.values(), ids=KINDS)
families = pytest.mark.parametrize("name", [V1, V2])


def small(name: str, **kwargs: Any) -> nn.Module:
    """``name`` at 64 px with few channels and blocks, float64, in eval mode, gamma 0, every norm and table redrawn."""
    torch.manual_seed(0)
    return ready(timm.create_model(name, **{**SMALL, **kwargs}))


def images(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Two random images, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


def attentions(model: nn.Module) -> list[nn.Module]:
    """Of every block, in order."""
    return [block.attn for stage in model.stages for block in stage.blocks]
