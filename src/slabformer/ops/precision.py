"""float64 wherever a model lives: on its device, or on the CPU where the device has none (Apple's GPUs)."""

from __future__ import annotations

import torch
from torch import Tensor

#: types of devices that compute in float32 at most
WITHOUT_FLOAT64 = frozenset({"mps"})


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64."""
    return device.type not in WITHOUT_FLOAT64


def wide_device(device: torch.device) -> torch.device:
    """``device``, or the CPU where it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on :func:`wide_device`."""
    return tensor.to(wide_device(tensor.device)).double()


def widened(tensor: Tensor) -> Tensor:
    """:func:`wide` of what holds floats; other tensors as they are, on the same device as those."""
    return wide(tensor) if tensor.is_floating_point() else tensor.to(wide_device(tensor.device))
