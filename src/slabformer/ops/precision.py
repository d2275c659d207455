"""float64 wherever a model lives: on its device, or on the CPU where the device has none (Apple's GPUs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slabformer._torch import make_wrapper, no_torch_function, tree_map_of

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


#: parameters of fewer elements are widened at once: they cost less memory than time
WIDE_ON_USE_FROM = 2**16


class WideOnUse(Tensor):
    """A float64 tensor whose values are made whenever an operation reads them, and dropped after it.

    A model whose large parameters are such runs in float64 in the memory of its own dtype and of one layer in float64.

    Args:
        like: A tensor of the same shape, on the device in question.
        values: Makes them, float64, on :func:`wide_device`.
    """

    __torch_function__ = no_torch_function
    values: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, values: Callable[[], Tensor]) -> WideOnUse:
        """Without memory for elements."""
        made = make_wrapper(cls, like.shape, dtype=torch.float64, device=wide_device(like.device))
        made.values = values
        return made

    def __init__(self, like: Tensor, values: Callable[[], Tensor]) -> None:
        pass  # Tensor's own takes no arguments

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # as nn.Parameter does with what it is given
            return cls(args[0], args[0].values)
        args, kwargs = tree_map_of(cls, lambda tensor: tensor.values(), (args, kwargs or {}))
        return func(*args, **kwargs)


def widened_on_use(tensor: Tensor) -> Tensor:
    """:func:`widened`, but for large tensors of shorter floats at every use."""
    if tensor.dtype is torch.float64 or not tensor.is_floating_point() or tensor.numel() < WIDE_ON_USE_FROM:
        return widened(tensor)
    return WideOnUse(tensor, lambda: wide(tensor))
