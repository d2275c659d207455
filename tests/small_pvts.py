"""PVTs and PVTv2s small enough for tests, with random norms and tables."""

from __future__ import annotations

from typing import Any

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


def small(name: str, **kwargs: Any) -> nn.Module:
    """``name`` at 64 px with few channels and blocks, float64, in eval mode, gamma 0, every norm and table redrawn."""
    torch.manual_seed(0)
    return ready(timm.create_model(name, **{**SMALL, **kwargs}))


def images(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Two random images, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
