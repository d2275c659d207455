"""A NaN stops training, names where it came from, and never reaches a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slabformer.nn.controls import repbn_modules

NEVER = torch.iinfo(torch.int64).max


class NonFiniteError(RuntimeError):
    """The loss, a gradient or a weight is NaN or infinite."""


class NonFiniteGuard:
    """Remembers on the device which step was the first with a non-finite value; nothing is read back until asked.

    Args:
        device: Of the values to come.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), NEVER, dtype=torch.int64, device=device)

    def observe(self, step: int, *values: Tensor) -> None:
        """Note ``step`` if one of ``values`` is not finite and no step before it was."""
        finite = torch.stack([value.detach().isfinite().all() for value in values]).all()
        self._first = torch.minimum(self._first, torch.where(finite, NEVER, step))

    def first_bad_step(self) -> int | None:
        """The first step with a non-finite value on any rank; waits for the device, and for all ranks."""
        first = self._first.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        step = int(first)
        return None if step == NEVER else step


def first_nonfinite_tensor(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first floating tensor that holds a NaN or an infinity."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in floating.values()]).tolist()
    return next((name for name, good in zip(floating, finite, strict=True) if not good), None)


def first_nonfinite_module(model: nn.Module, run: Callable[[], None]) -> str | None:
    """Name of the module that is the first to put out a NaN or an infinity while ``run`` calls ``model``.

    Modes stay as they are; buffers, running statistics among them, are put back afterwards. Norms take this rank's
    statistics alone: the NaN of another rank is not this one's, and the ranks need not run equally often.
    """
    names: list[str] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not names and not all(bool(t.isfinite().all()) for t in tensors_in(output) if t.is_floating_point()):
                names.append(f"{name or 'the model'} ({type(module).__name__})")

        return hook

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), _alone(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return names[0] if names else None


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """No norm of ``model`` waits for other ranks inside the block; torch's SyncBatchNorm runs in eval mode there."""
    syncs = {norm: norm.sync for norm in repbn_modules(model).values()}
    waiting = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    for norm in syncs:
        norm.sync = None
    for module in waiting:
        module.eval()
    try:
        yield
    finally:
        for norm, sync in syncs.items():
            norm.sync = sync
        for module in waiting:
            module.train()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
