"""A decision carried out on the module tree: the only place that changes a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._torch import HOOKS, buffer_slots, child_slots, parameter_slots, unsaved_buffers
from slabformer.nn.affine import Affine, Folded
from slabformer.nn.norms import ScaleShift
from slabformer.ops.precision import WideOnUse
from slabformer.surgery.convert import switch_off_fast_paths
from slabformer.surgery.fuse.tree.norms import Norm, find_norms, find_pads, tail_of
from slabformer.surgery.fuse.tree.values import Solution, owner_of, tensor_at
from slabformer.surgery.one_input import take_one_input_

#: attribute of a module that names the biases it got by folding; a plain tuple survives copies, moves and pickling
NEW_BIASES = "slabformer_new_biases"
#: the same for buffers that hold a shift now and are saved since
KEPT_BUFFERS = "slabformer_kept_buffers"


def commit(
    model: nn.Module, solution: Solution, untouchable: Collection[int], store: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Write a solution into ``model`` (the one it was solved for, or a copy): the only place that changes a model.

    Parameters are new objects, so that copies keep theirs; modules, their classes, names and hooks stay. What ``store``
    makes of a new value takes its place.
    """
    norms = find_norms(model)
    for names in solution.layers():
        on_use = [name for name in names if name not in solution.new_biases and _is_wide_on_use(model, name)]
        for name in on_use:
            _set_tensor(model, name, WideOnUse(tensor_at(model, name), partial(solution.value, name)))
        values = solution.values([name for name in names if name not in on_use])
        for name, value in values.items():
            if name in solution.new_biases:
                create_bias(model, name, solution.new_biases[name], len(value))
            stored = value.to(tensor_at(model, name), copy=True).contiguous()
            _set_tensor(model, name, stored if store is None else store(stored))
    pads = find_pads(model)
    for index, fill in solution.fills.items():
        pads[index].module.pad_with(fill)
    for norm in norms:
        if norm.index not in untouchable:
            new = _replacement(norm, solution.maps[norm.index], norm.index in solution.gone)
            set_module(model, norm.names, new.train(norm.module.training))
    switch_off_fast_paths(model)


def _is_wide_on_use(model: nn.Module, name: str) -> bool:
    return isinstance(tensor_at(model, name), WideOnUse)


def _set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    owner, leaf = owner_of(model, name)
    if leaf in parameter_slots(owner):
        requires_grad = tensor_at(model, name).requires_grad
        setattr(owner, leaf, nn.Parameter(value, requires_grad))  # an LSTM notes that, and lists its weights anew
        return
    buffer_slots(owner)[leaf] = value
    if leaf in unsaved_buffers(owner):
        keep_buffer(model, name)


def keep_buffer(model: nn.Module, name: str) -> None:
    """Let the buffer ``name`` be saved from now on, and note that on its module."""
    owner, leaf = owner_of(model, name)
    unsaved_buffers(owner).discard(leaf)
    setattr(owner, KEPT_BUFFERS, (*getattr(owner, KEPT_BUFFERS, ()), leaf))


def _replacement(norm: Norm, scale_shift: ScaleShift, gone: bool) -> nn.Module:
    old, like = norm.module, norm.reference
    options: dict[str, Any] = {"eps": getattr(old, "eps", 1e-5), "then": tail_of(old)}
    options |= {"device": like.device, "dtype": like.dtype}
    if gone:
        folded = Folded(norm.num_channels, **options)
        take_one_input_(folded, old)
        return folded
    if isinstance(old, Affine):
        new = old
    else:
        new = Affine(norm.num_channels, channel_dim=norm.channel_dim, **options)
        new.requires_grad_(like.requires_grad)
        for name in HOOKS:  # it stands for the norm, so it inherits them
            setattr(new, name, getattr(old, name))
    for parameter, value in zip((new.weight, new.bias), scale_shift, strict=True):
        parameter.data = value.to(parameter)
    return new


def create_bias(model: nn.Module, name: str, weight: str, num_out: int) -> None:
    """Give the module that holds ``weight`` a bias of zeros called ``name``, and note on it that it is new."""
    like, (owner, leaf) = model.get_parameter(weight), owner_of(model, name)
    zeros = torch.zeros(num_out, dtype=like.dtype, device=like.device)
    parameter_slots(owner)[leaf] = nn.Parameter(zeros, like.requires_grad)
    setattr(owner, NEW_BIASES, (*getattr(owner, NEW_BIASES, ()), leaf))


def set_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` at every one of ``names``."""
    for name in names:
        parent, leaf = owner_of(model, name)
        child_slots(parent)[leaf] = module
