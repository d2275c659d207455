"""BatchNorms of torch, timm, torchvision and others: which modules they are, and their map in eval mode."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from slabformer._torch import BatchNorm, child_slots, parameter_slots
from slabformer.ops.precision import wide, wide_device

#: what timm's norms with an activation inside run behind their map, in this order
TAIL = ("drop", "act")


def is_batch_norm(module: nn.Module) -> bool:
    """BatchNorm with running statistics, proper or timm's; other subclasses may compute anything."""
    plain = type(module).forward in (BatchNorm.forward, nn.SyncBatchNorm.forward) or _has_tail(module)
    return isinstance(module, BatchNorm) and plain and isinstance(module.running_mean, Tensor)


def batch_norm_map(module: BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64 ``(C,)`` each."""
    assert module.running_mean is not None
    assert module.running_var is not None
    scale = (wide(module.running_var) + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * wide(module.weight)
    shift = -wide(module.running_mean) * scale
    return scale.detach(), (shift if module.bias is None else shift + wide(module.bias)).detach()


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """A BatchNorm whose gain, offset and statistics are all buffers, as detectors have: torchvision's, DETR's."""
    bare = not parameter_slots(module) and (not child_slots(module) or _has_tail(module))
    return bare and {name for name, _ in module.named_buffers()} == {"weight", "bias", "running_mean", "running_var"}


@torch.no_grad()
def probed_map(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The map of a module that does not say what it adds to its variance, by what it makes of 0 and 1."""
    one = torch.ones(1, len(module.bias), 1, 1, dtype=torch.float64, device=wide_device(module.bias.device))  # type: ignore[arg-type]
    double = copy.deepcopy(module).to(one.device).double()
    for name in child_slots(double):
        child_slots(double)[name] = nn.Identity()  # what comes after the map
    shift = double(0 * one).flatten()
    return double(one).flatten() - shift, shift


def _has_tail(module: nn.Module) -> bool:
    """Whether it holds a dropout and an activation, and these hold no tensors, which would change their names."""
    inside = [tensor for child in module.children() for tensor in (*child.parameters(), *child.buffers())]
    return child_slots(module).keys() == set(TAIL) and not inside
