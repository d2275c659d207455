"""Carry out a plan on the module tree: algebra in float64, cast back once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slabformer.nn.affine import Affine, Folded
from slabformer.nn.norms import ScaleShift
from slabformer.ops.affine import compose, fold_into_next, fold_into_previous, spread
from slabformer.ops.precision import wide
from slabformer.surgery.convert import HOOKS, switch_off_fast_paths
from slabformer.surgery.fuse.tree.norms import Norm, find_norms, tail_of
from slabformer.surgery.fuse.tree.pads import Pad, fill_after, fill_before, find_pads
from slabformer.surgery.fuse.tree.plan import Edit, Part, Target, share
from slabformer.surgery.one_input import take_one_input_

#: attribute of a module that names the biases it got by folding; a plain tuple survives copies, moves and pickling
NEW_BIASES = "slabformer_new_biases"
#: the same for buffers that hold a shift now and are saved since
KEPT_BUFFERS = "slabformer_kept_buffers"


@dataclass
class Solution:
    """The new values, before anything is changed.

    Attributes:
        tensors: Float64 value of every parameter that changes, by name.
        new_biases: Those among them that do not exist yet, and the weight beside which they belong.
        maps: Scale and shift of every norm, after it has taken over others.
        fills: What pads that a fold passes must pad with, float64, by index.
        gone: Norms that become the identity.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    new_biases: dict[str, str] = field(default_factory=dict)
    maps: dict[int, ScaleShift] = field(default_factory=dict)
    fills: dict[int, Tensor] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)

    def overflows(self, model: nn.Module) -> bool:
        """Whether a value is too large for the dtype that it will be stored in."""
        for name, value in self.tensors.items():
            dtype = tensor_at(model, self.new_biases.get(name, name)).dtype
            if bool((value.isfinite() & ~value.to(dtype).isfinite()).any()):
                return True
        return False


def solve(model: nn.Module, norms: Sequence[Norm], edits: Sequence[Edit]) -> Solution:
    """The parameters of ``model`` after ``edits``, made in order; the model is only read."""
    maps, fills = maps_after(norms, find_pads(model), edits)
    solution = Solution(maps=maps, fills=fills)
    for edit in edits:
        for target in edit.targets:
            if target.weight is not None:
                _take_over(model, solution, solution.maps[edit.norm], target, target.weight)
            if target.values is not None:
                _map_values(model, solution, solution.maps[edit.norm], target, target.values)
        solution.gone.add(edit.norm)
    return solution


def maps_after(
    norms: Sequence[Norm], pads: Sequence[Pad], edits: Iterable[Edit]
) -> tuple[dict[int, ScaleShift], dict[int, Tensor]]:
    """Scale and shift of every norm after ``edits``, and the fills of the pads that these change."""
    maps = {norm.index: norm.scale_shift() for norm in norms}
    fills: dict[int, Tensor] = {}
    for edit in edits:
        for target in edit.targets:
            own, is_next = _share(maps[edit.norm], target), target.side == "next"
            if target.norm is not None:
                other = maps[target.norm]
                maps[target.norm] = compose(own, other) if is_next else compose(other, own)
            if target.pad is not None:
                fill = fills.get(target.pad, pads[target.pad].fill())
                fills[target.pad] = (fill_before if is_next else fill_after)(fill, own)
    return maps, fills


def _share(scale_shift: ScaleShift, target: Target) -> ScaleShift:
    scale, shift = share(target.role, *scale_shift)
    return spread(scale, shift * target.factor, target.index.to(scale.device))


def _take_over(model: nn.Module, solution: Solution, scale_shift: ScaleShift, target: Target, part: Part) -> None:
    whole = _current(model, solution, part.name)
    opened = part.opened(whole)
    weight = opened[part.rows]
    scale, shift = (t.to(weight.device) for t in _share(scale_shift, target))
    if target.gain is not None:
        shift = shift / gain_of(model, target.gain)
    bias = _bias(model, solution, target, like=weight)
    needs_bias = bias is not None or target.role != "scale"
    if target.side == "next":
        weight, bias = fold_into_next(weight, bias, scale, shift, target.groups)
    else:
        weight, bias = fold_into_previous(weight, bias, scale, shift)
    solution.tensors[part.name] = part.closed(opened.index_copy(0, part.rows.to(whole.device), weight))
    for own in target.bias if needs_bias else ():
        if target.new_bias:
            solution.new_biases[own.name] = part.name
            solution.tensors.setdefault(own.name, whole.new_zeros(len(opened)))
        values = bias[own.channels.to(bias.device)]
        solution.tensors[own.name] = _current(model, solution, own.name).index_copy(0, own.rows.to(bias.device), values)


def _map_values(model: nn.Module, solution: Solution, scale_shift: ScaleShift, target: Target, part: Part) -> None:
    whole = _current(model, solution, part.name)
    scale, shift = (t.to(whole.device) for t in _share(scale_shift, target))
    rows = part.rows.to(whole.device)
    values = whole.movedim(part.axis, -1)[..., rows] * scale + shift
    solution.tensors[part.name] = whole.index_copy(part.axis, rows, values.movedim(-1, part.axis))


def gain_of(model: nn.Module, part: Part) -> Tensor:
    """Value of a LayerScale for each output channel that it multiplies, float64."""
    return wide(tensor_at(model, part.name).detach()).flatten()[part.rows]


def _bias(model: nn.Module, solution: Solution, target: Target, like: Tensor) -> Tensor | None:
    """The bias of a neighbour before a fold, ``(O,)``."""
    if target.new_bias and not any(own.name in solution.tensors for own in target.bias):
        return None
    bias = like.new_zeros(like.shape[0])
    for own in target.bias:
        bias[own.channels] = _current(model, solution, own.name)[own.rows].to(bias)
    return bias


def _current(model: nn.Module, solution: Solution, name: str) -> Tensor:
    found = solution.tensors.get(name)
    return wide(tensor_at(model, name).detach()) if found is None else found


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``."""
    owner, leaf = _parent(model, name)
    return getattr(owner, leaf)


def commit(model: nn.Module, solution: Solution, untouchable: Collection[int]) -> None:
    """Write a solution into ``model`` (the one it was solved for, or a twin): the only place that changes a model.

    Parameters are new objects, so that twins keep theirs; modules, their classes, names and hooks stay.
    """
    norms = find_norms(model)
    for name, value in solution.tensors.items():
        if name in solution.new_biases:
            create_bias(model, name, solution.new_biases[name], len(value))
        _store(model, name, value)
    pads = find_pads(model)
    for index, fill in solution.fills.items():
        pads[index].module.pad_with(fill)
    for norm in norms:
        if norm.index not in untouchable:
            new = _replacement(norm, solution.maps[norm.index], norm.index in solution.gone)
            set_module(model, norm.names, new.train(norm.module.training))
    switch_off_fast_paths(model)


def _store(model: nn.Module, name: str, value: Tensor) -> None:
    like, (owner, leaf) = tensor_at(model, name), _parent(model, name)
    value = value.to(like).contiguous()
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(value, like.requires_grad))  # an LSTM notes that, and lists its weights anew
        return
    owner._buffers[leaf] = value
    if leaf in owner._non_persistent_buffers_set:
        keep_buffer(model, name)


def keep_buffer(model: nn.Module, name: str) -> None:
    """Let the buffer ``name`` be saved from now on, and note that on its module."""
    owner, leaf = _parent(model, name)
    owner._non_persistent_buffers_set.discard(leaf)
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
    like, (owner, leaf) = model.get_parameter(weight), _parent(model, name)
    owner._parameters[leaf] = nn.Parameter(like.new_zeros(num_out), like.requires_grad)
    setattr(owner, NEW_BIASES, (*getattr(owner, NEW_BIASES, ()), leaf))


def set_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` at every one of ``names``."""
    for name in names:
        parent, leaf = _parent(model, name)
        parent._modules[leaf] = module


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf
