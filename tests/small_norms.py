"""A norm of six channels that looks trained, and a mask for two images of four tokens."""

from __future__ import annotations

import torch

from slabformer import RepBN

C = 6
MASK = torch.tensor([[True, True, False, True], [True, False, False, False]])


def trained(channel_dim: int = -1, dtype: torch.dtype = torch.float64, dim: int = C) -> RepBN:
    """RepBN with random parameters and statistics, the same each time."""
    torch.manual_seed(0)
    norm = RepBN(dim, channel_dim=channel_dim, eta=0.7, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.to(dtype)
