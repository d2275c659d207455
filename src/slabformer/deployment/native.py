"""Linear attention in C++ for inference on a CPU, in place of what a compiler makes of its operators."""

from __future__ import annotations

import logging
from typing import TypeGuard, TypeVar, cast

import torch
from torch import nn

from slabformer.nn.attention import LinearAttentionCore
from slabformer.ops.dispatch import NARROWEST, NATIVE_STEP, NATIVE_THRESHOLDS, WIDEST
from slabformer.ops.native.build import BuildError
from slabformer.ops.native.linear_attention import prepare
from slabformer.surgery.fuse.tree.copies import copy_model

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def use_native_(model: nn.Module) -> int:
    """Let the linear attention of ``model`` run in C++ whenever it needs no gradient and is on a CPU.

    What is missing is built, in a second or two for each width of its heads, and kept for other processes. Training,
    exported programs and other devices are not touched by it.

    Args:
        model: Edited in place: its linear attentions in float32 or bfloat16 with heads of a width that is a multiple of
            16, 128 at most.

    Returns:
        How many linear attentions that are.

    Raises:
        BuildError: If there is no C++ compiler, or it fails; ``model`` is then unchanged.
    """
    found = [module for module in model.modules() if _is_taken(module)]
    for dtype, width in dict.fromkeys((a.positional_encoding.dtype, a.dim // a.num_heads) for a in found):
        prepare(dtype, width, width)
    for attention in found:
        attention.native = True
    return len(found)


def natively(model: Model, device: torch.device, notes: list[str] | None = None) -> tuple[Model, int]:
    """A copy of ``model`` that shares its weights and whose linear attention runs in C++, and how much of that it has.

    Args:
        model: In eval mode.
        device: Where it runs.
        notes: Told why, where C++ cannot be built.

    Returns:
        ``model`` itself and 0 where nothing runs in C++.
    """
    if not runs_natively(model, device):
        return model, 0
    native = cast(Model, copy_model(model, lambda tensor: tensor))
    try:
        return native, use_native_(native)
    except BuildError as error:
        logger.warning("no linear attention in C++: %s", error)
        if notes is not None:
            notes.append(f"no linear attention in C++: {error}")
        return model, 0


def runs_natively(model: nn.Module, device: torch.device) -> bool:
    """Whether ``model`` has linear attention that C++ could compute on ``device``."""
    return device.type == "cpu" and any(_is_taken(module) for module in model.modules())


def _is_taken(module: nn.Module) -> TypeGuard[LinearAttentionCore]:
    if not isinstance(module, LinearAttentionCore):
        return False
    width = module.dim // module.num_heads
    fits = width % NATIVE_STEP == 0 and NARROWEST <= width <= WIDEST
    return fits and module.positional_encoding.dtype in NATIVE_THRESHOLDS
