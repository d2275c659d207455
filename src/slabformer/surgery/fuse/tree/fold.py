"""What a decision consists of, and how it is carried out on the module tree: algebra in float64, cast back once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slabformer._torch import HOOKS, buffer_slots, child_slots, parameter_slots, unsaved_buffers
from slabformer.nn.affine import Affine, Folded
from slabformer.nn.norms import ScaleShift
from slabformer.ops.affine import compose, spread
from slabformer.ops.precision import wide
from slabformer.surgery.convert import switch_off_fast_paths
from slabformer.surgery.fuse.consumers import Consumer, Side
from slabformer.surgery.fuse.report import Action, NormOutcome
from slabformer.surgery.fuse.tree.norms import (
    Layer,
    Norm,
    Pad,
    fill_after,
    fill_before,
    find_layers,
    find_norms,
    find_pads,
    tail_of,
)
from slabformer.surgery.one_input import take_one_input_
from slabformer.surgery.reasons import Why

#: what a neighbour takes over of ``x * scale + shift``
Role = Literal[
    "map",  # all of it
    "scale",  # ``x * scale``
    "add",  # ``x + shift / scale``
    "subtract",  # the inverse of that
    "carry",  # ``(x + shift) / scale``, for what is added to the norm's output
    "unscale",  # ``x / scale``, the same behind the first such sum
]
#: roles without a shift
SCALES: frozenset[Role] = frozenset({"scale", "unscale"})


def scale_of(role: Role) -> Role:
    """What one operand of a sum takes over where another has ``role``."""
    return "unscale" if role in ("carry", "unscale") else "scale"


def share(role: Role, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What ``role`` takes over of a map, as a scale and shift of its own."""
    if role == "map":
        return scale, shift
    if role == "scale":
        return scale, torch.zeros_like(shift)
    if role == "unscale":
        return 1 / scale, torch.zeros_like(shift)
    move = torch.where(shift == 0, shift, shift / scale)
    if role == "carry":
        return 1 / scale, move
    return torch.ones_like(scale), move if role == "add" else -move


@dataclass(frozen=True)
class Part:
    """Elements of one parameter or buffer that serve as the weight or bias of some output channels.

    Attributes:
        name: Of the parameter; the first of its names where it is tied.
        axis: Its axis that counts output channels.
        rows: Which elements along it.
        channels: The output channel that each of them serves.
        groups: Of a transposed convolution, whose weight ``(in, out / groups, *kernel)`` holds them group by group.
    """

    name: str
    axis: int
    rows: Tensor
    channels: Tensor
    groups: int = 1

    def agrees(self, other: Part) -> bool:
        """Whether both are the same elements for the same channels."""
        mine, others = (self.name, self.axis), (other.name, other.axis)
        return mine == others and torch.equal(self.rows, other.rows) and torch.equal(self.channels, other.channels)

    def opened(self, stored: Tensor) -> Tensor:
        """The whole parameter with its output channels first, ``(out, in / groups, *kernel)``."""
        if self.groups == 1:
            return stored.movedim(self.axis, 0)
        return stored.unflatten(0, (self.groups, -1)).movedim(2, 1).flatten(0, 1)

    def closed(self, opened: Tensor) -> Tensor:
        """Back from :meth:`opened`."""
        if self.groups == 1:
            return opened.movedim(0, self.axis)
        return opened.unflatten(0, (self.groups, -1)).movedim(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Target:
    """What one neighbour takes over.

    Attributes:
        name: Of the neighbour, for the report.
        role: What it takes over of the norm's map.
        side: Where it stands.
        index: Channel of the norm that each channel of the neighbour belongs to, -1 for none.
        consumer: Whose algebra changes the weight; None if the neighbour is a norm, a pad or a registered module.
        weight: Its weight, its table, or the parameter that it is.
        bias: Its bias.
        new_bias: Whether that bias must be created.
        gain: What its output is multiplied by before it meets the stream (LayerScale), if anything.
        factor: What the shift is multiplied by here: the number that stands between the neighbour and the norm behind
            which it stands, or one over that where it stands in front.
        norm: Index of the norm that takes it over instead, or None.
        pad: Index of the pad whose fill changes, or None.
        layer: Index of the registered module whose tensors change, or None.
    """

    name: str
    role: Role
    side: Side
    index: Tensor
    consumer: Consumer | None = None
    weight: Part | None = None
    bias: tuple[Part, ...] = ()
    new_bias: bool = False
    gain: Part | None = None
    factor: float = 1.0
    norm: int | None = None
    pad: int | None = None
    layer: int | None = None

    def agrees(self, other: Target) -> bool:
        """Whether both are one and the same change."""
        mine, others = (
            [part for part in (own.weight, own.gain, *own.bias) if part is not None] for own in (self, other)
        )
        return (
            (self.role, self.side, self.factor) == (other.role, other.side, other.factor)
            and len(mine) == len(others)
            and all(one.agrees(two) for one, two in zip(mine, others, strict=True))
            and torch.equal(self.index, other.index)
        )


@dataclass(frozen=True)
class Edit:
    """One norm's way into its neighbours."""

    norm: int
    action: Action
    targets: tuple[Target, ...]


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        edits: In the order in which they must be made.
        reasons: Why each other norm is kept.
        untouchable: Norms that cannot even become an Affine.
        tied: Parameters that stood in the way because several modules hold them.
        shared: Those that did because their module has several names and is called on several inputs.
    """

    edits: list[Edit] = field(default_factory=list)
    reasons: dict[int, Why] = field(default_factory=dict)
    untouchable: set[int] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)

    def outcomes(self, norms: Iterable[Norm]) -> tuple[NormOutcome, ...]:
        """What becomes of every norm."""
        folded = {edit.norm: edit for edit in self.edits}
        found = []
        for norm in norms:
            edit = folded.get(norm.index)
            if edit is None:
                why = self.reasons[norm.index]
                found.append(NormOutcome(norm.name, "kept", reason=why.words, codes=why.codes))
            else:
                into = dict.fromkeys(target.name for target in edit.targets)
                found.append(NormOutcome(norm.name, edit.action, tuple(into)))
        return tuple(found)


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
    layers = find_layers(model)
    for edit in edits:
        for target in edit.targets:
            if target.consumer is not None and target.weight is not None:
                _take_over(model, solution, solution.maps[edit.norm], target, target.consumer, target.weight)
            if target.layer is not None:
                _module_takes_over(model, solution, solution.maps[edit.norm], target, layers[target.layer])
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


def _take_over(
    model: nn.Module, solution: Solution, scale_shift: ScaleShift, target: Target, consumer: Consumer, part: Part
) -> None:
    whole = _current(model, solution, part.name)
    opened = part.opened(whole)
    weight = opened[part.rows]
    scale, shift = (t.to(weight.device) for t in _share(scale_shift, target))
    if target.gain is not None:
        shift = shift / gain_of(model, target.gain)
    bias = _bias(model, solution, target, like=weight) if target.bias else None
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    taken = (consumer.take_input if target.side == "next" else consumer.take_output)(tensors, scale, shift)
    solution.tensors[part.name] = part.closed(opened.index_copy(0, part.rows.to(whole.device), taken["weight"]))
    for own in target.bias if bias is not None or target.role not in SCALES else ():
        if target.new_bias:
            solution.new_biases[own.name] = part.name
            solution.tensors.setdefault(own.name, whole.new_zeros(len(opened)))
        values = taken["bias"][own.channels.to(whole.device)]
        solution.tensors[own.name] = _current(model, solution, own.name).index_copy(
            0, own.rows.to(whole.device), values
        )


def _module_takes_over(
    model: nn.Module, solution: Solution, scale_shift: ScaleShift, target: Target, layer: Layer
) -> None:
    names = {name: f"{layer.name}.{name}" for name in layer.tensors()}
    tensors = {name: _current(model, solution, full) for name, full in names.items()}
    like = next(iter(tensors.values()), target.index)
    scale, shift = (t.to(like.device) for t in _share(scale_shift, target))
    take = layer.consumer.take_input if target.side == "next" else layer.consumer.take_output
    for name, value in take(tensors, scale, shift).items():
        if name not in tensors or value.shape != tensors[name].shape:
            kind, shape = type(layer.consumer).__name__, tuple(value.shape)
            expected = f"it has shape {tuple(tensors[name].shape)}" if name in tensors else "it has no such tensor"
            raise ValueError(f"{kind}.{take.__name__} gives {layer.name} a {name!r} of shape {shape}, but {expected}")
        solution.tensors[names[name]] = wide(value)


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
    """Write a solution into ``model`` (the one it was solved for, or a copy): the only place that changes a model.

    Parameters are new objects, so that copies keep theirs; modules, their classes, names and hooks stay.
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
    if leaf in parameter_slots(owner):
        setattr(owner, leaf, nn.Parameter(value, like.requires_grad))  # an LSTM notes that, and lists its weights anew
        return
    buffer_slots(owner)[leaf] = value
    if leaf in unsaved_buffers(owner):
        keep_buffer(model, name)


def keep_buffer(model: nn.Module, name: str) -> None:
    """Let the buffer ``name`` be saved from now on, and note that on its module."""
    owner, leaf = _parent(model, name)
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
    like, (owner, leaf) = model.get_parameter(weight), _parent(model, name)
    parameter_slots(owner)[leaf] = nn.Parameter(like.new_zeros(num_out), like.requires_grad)
    setattr(owner, NEW_BIASES, (*getattr(owner, NEW_BIASES, ()), leaf))


def set_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` at every one of ``names``."""
    for name in names:
        parent, leaf = _parent(model, name)
        child_slots(parent)[leaf] = module


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf
