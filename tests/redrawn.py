"""Modules whose every parameter matters."""

from __future__ import annotations

import torch
from torch import nn


def redrawn(module: nn.Module, std: float = 0.3) -> nn.Module:
    """``module`` with random parameters, the same each time, float64, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module.double().eval()
