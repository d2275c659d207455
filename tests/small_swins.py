"""Swins small enough for tests, and what they are tried with."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from slabformer import testing

NAMES = ("swin_tiny_prepbn", "swin_small_prepbn", "slab_swin_tiny", "slab_swin_small", "slab_swin_base")
PLANS = ("SSSS", "LLSS", "LLLL", "SLSL")
# windows of 3 tokens: at 64 px maps of 16, 8, 4 and 2 are padded, shifted in odd blocks, and the last is smaller
SMALL = {"img_size": 64, "embed_dim": 8, "num_heads": (1, 2, 2, 4), "depths": (1, 1, 2, 1), "window_size": 3}
SIZES = [(64, 64), (96, 64), (50, 130)]
each_plan = pytest.mark.parametrize("attention", PLANS)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def create(attention: str = "LLSS", **kwargs) -> nn.Module:
    """``slab_swin_tiny`` with few channels and blocks, float64, in eval mode, every norm redrawn."""
    torch.manual_seed(0)
    model = timm.create_model("slab_swin_tiny", attention=attention, **{"num_classes": 10, **SMALL, **kwargs})
    return testing.randomize_norms_(model).double().eval()


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    """Random images, float64, the same each time."""
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
