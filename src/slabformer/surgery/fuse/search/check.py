"""Refuse, before anything changes, what cannot be fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from slabformer._torch import is_compiled_in_place
from slabformer.nn.affine import Folded
from slabformer.nn.norms import norms_of
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.statistics import check_statistics
from slabformer.surgery.fuse.tree.copies import Example
from slabformer.surgery.fuse.tree.norms import Norm, find_norms

#: wrappers by class name, so that none of them need be imported, and what to pass instead
_WRAPPERS = {
    "OptimizedModule": "it is compiled; pass model._orig_mod, and compile what fuse returns",
    "FullyShardedDataParallel": "its parameters are sharded; load a full state dict into a plain model first",
    "FSDPModule": "its parameters are sharded; load a full state dict into a plain model first",
    "ScriptModule": "it is scripted; pass the Python module it was made from",
}


def check_model(model: nn.Module, allow_gamma: bool) -> list[Norm]:
    """The norms of ``model``.

    Raises:
        TypeError: If it is no module.
        ValueError: If it is wrapped, in train mode, without norms, still fading, or holds no plain tensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse needs an nn.Module, got {type(model).__name__}")
    _check_wrappers(model)
    _check_mode(model)
    _check_parameters(model)
    norms = find_norms(model)
    if not norms and not any(isinstance(module, Folded) for module in model.modules()):
        raise ValueError(
            f"no RepBN, PRepBN, BatchNorm or Affine to fuse in {type(model).__name__}{_other_norms(model)}; "
            "call convert_norms_(model) and train it first"
        )
    if norms and "" in norms[0].names:
        raise ValueError(f"the model itself is a {type(model).__name__}; wrap it: nn.Sequential(norm)")
    if not allow_gamma:
        _check_gamma(model)
    return norms


def _other_norms(model: nn.Module) -> str:
    """Words about the first kind of norm that cannot be folded, if there is one."""
    staying = Counter(row for _, row in norms_of(model) if row.scale_shift is None)
    return next((f", but {count} {row.title} ({row.stays})" for row, count in staying.most_common(1)), "")


def check_values(norms: Sequence[Norm]) -> None:
    """Refuse norms whose map in eval mode is not finite, or comes of statistics that no data has.

    Raises:
        ValueError: Naming the first one.
    """
    statistics = {norm.name: norm.statistics() for norm in norms}
    check_statistics({name: found for name, found in statistics.items() if found is not None})
    for norm in norms:
        if not all(each.isfinite().all() for each in norm.scale_shift()):
            raise ValueError(f"{norm.name}: weight, bias or eta is not finite; restore a checkpoint from before")


def _check_wrappers(model: nn.Module) -> None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(f"fuse got a model wrapped in {type(model).__name__}; pass model.module")
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                raise ValueError(f"fuse cannot edit {name or 'the model'}: {_WRAPPERS[base.__name__]}")


def check_not_compiled(model: nn.Module) -> None:
    """Refuse to edit modules that ``module.compile()`` has compiled in place; a copy of them is not compiled.

    Raises:
        ValueError: Naming the first one.
    """
    for name, module in model.named_modules():
        if is_compiled_in_place(module):
            raise ValueError(
                f"{name or 'the model'} is compiled in place; use fuse(), which copies, and compile the copy"
            )


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise ValueError("fuse needs eval mode, got a model in train mode; call model.eval() first")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"fuse needs eval mode, but {name} is in train mode; call model.eval() first")


def _check_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.", "torchao.")):
            raise ValueError(f"{name} is quantised ({type(module).__name__}); fuse first, quantise afterwards")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(f"{name} has no shape yet; run the model once first")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; load the weights first")
        if type(tensor) not in (nn.Parameter, Tensor):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}; fuse needs plain tensors (fuse before sharding or quantising)"
            )
        is_byte = tensor.element_size() == 1 and tensor.dtype != torch.bool
        if tensor.is_quantized or (isinstance(tensor, nn.Parameter) and is_byte):
            raise ValueError(f"{name} is quantised ({tensor.dtype}); fuse first, quantise afterwards")


def _check_gamma(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PRepBN) and float(module.gamma) != 0:
            raise ValueError(
                f"{name} still holds its norm (gamma is {float(module.gamma):.3g}); finish the schedule, take the "
                "model's gamma with copy_gamma_(model, average), or pass allow_gamma=True to drop the norm as it is"
            )


def check_examples(example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> list[Example]:
    """One Example per set of inputs.

    Raises:
        TypeError: If the inputs are no tensor, tuple, or list of such, or the keyword arguments no dict of strings.
        ValueError: If there are none.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise TypeError(f"example_kwargs must be a dict of keyword arguments, got {type(example_kwargs).__name__}")
    kwargs = dict(example_kwargs or {})
    cases: Sequence[Any] = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not cases:
        raise ValueError("fuse needs at least one example input, got an empty list")
    examples = []
    for case in cases:
        if not isinstance(case, (Tensor, tuple)):
            hint = "; pass a dict as example_kwargs, with () as example_inputs" if isinstance(case, Mapping) else ""
            raise TypeError(
                f"example_inputs must be a tensor, a tuple of positional arguments, or a list of such, "
                f"got {type(case).__name__}{hint}"
            )
        examples.append(Example((case,) if isinstance(case, Tensor) else case, kwargs))
    if any(not example.tensors() for example in examples):
        raise ValueError("fuse needs example inputs, got no tensor in example_inputs and example_kwargs")
    return examples


def shapes_of(examples: Sequence[Example]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Shapes of the tensors of each example."""
    return tuple(tuple(tuple(tensor.shape) for tensor in example.tensors()) for example in examples)
