"""What a decision consists of, and how it is carried out on the module tree: algebra in float64, cast back once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slabformer._torch import HOOKS, buffer_slots, child_slots, parameter_slots, unsaved_buffers
from slabformer.nn.affine import Affine, Folded
from slabformer.nn.norms import ScaleShift
from slabformer.ops.affine import compose, spread
from slabformer.ops.precision import WIDE_ON_USE_FROM, WideOnUse, wide
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

    def of(self, opened: Tensor) -> Tensor:
        """Its elements of an opened parameter, which is no copy where they are all in order."""
        return opened if self._is_all(opened) else opened[self.rows]

    def put(self, opened: Tensor, values: Tensor) -> Tensor:
        """An opened parameter with other values for its elements."""
        return values if self._is_all(opened) else opened.index_copy(0, self.rows.to(opened.device), values)

    def _is_all(self, opened: Tensor) -> bool:
        return torch.equal(self.rows, torch.arange(len(opened), device=self.rows.device))

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


class Solution:
    """What edits make of a model that is only read: maps at once, parameters whenever they are asked for.

    The new values of one layer depend on no other layer's, so that each may be made, used and dropped in its turn.

    Attributes:
        maps: Scale and shift of every norm, after it has taken over others.
        fills: What pads that a fold passes must pad with, float64, by index.
        gone: Norms that become the identity.
        new_biases: Parameters that do not exist yet, and the weight beside which each belongs.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm], edits: Sequence[Edit]) -> None:
        self._model = model
        self.maps, self.fills = maps_after(norms, find_pads(model), edits)
        self.gone = {edit.norm for edit in edits}
        self.new_biases: dict[str, str] = {}
        self._groups: dict[str, _Group] = {}
        self._small: dict[str, Tensor] = {}
        layers = find_layers(model)
        for edit in edits:
            for target in edit.targets:
                if target.layer is not None:
                    self._add(_LayerChange.of(target, self.maps[edit.norm], layers[target.layer]))
                elif target.consumer is not None and target.weight is not None:
                    self._add(self._parameter_change(target, target.weight, self.maps[edit.norm]))

    def _parameter_change(self, target: Target, weight: Part, scale_shift: ScaleShift) -> _ParameterChange:
        scale, shift = _share(scale_shift, target)
        if target.gain is not None:
            gain = gain_of(self._model, target.gain)
            shift = shift.to(gain.device) / gain
        exists = not target.new_bias or any(own.name in self.new_biases for own in target.bias)
        biases = target.bias if exists or target.role not in SCALES else ()
        if target.new_bias:
            self.new_biases |= {own.name: weight.name for own in biases}
        return _ParameterChange(target, weight, biases, scale, shift)

    def _add(self, change: _Change) -> None:
        """Put what shares a parameter with ``change`` into one group with it, each in its order."""
        joined = dict.fromkeys(self._groups[name] for name in change.touched if name in self._groups)
        group = _Group((*(own for other in joined for own in other.changes), change))
        names = dict.fromkeys(name for other in joined for name in other.names)
        group.names = tuple(names | dict.fromkeys(change.written(self._model, group)))
        self._groups |= dict.fromkeys(group.names, group)

    @property
    def names(self) -> Collection[str]:
        """The parameters and buffers that change."""
        return self._groups.keys()

    def layers(self) -> Iterator[tuple[str, ...]]:
        """Those names, in groups whose values depend on each other."""
        yield from dict.fromkeys(group.names for group in self._groups.values())

    def values(self, names: Collection[str]) -> dict[str, Tensor]:
        """Float64 values of parameters of one group, by name."""
        if not all(name in self._small for name in names):
            made = self._groups[next(iter(names))].values(self._model)
            self._small |= {name: value for name, value in made.items() if value.numel() < WIDE_ON_USE_FROM}
            return {name: made[name] for name in names}
        return {name: self._small[name] for name in names}

    def value(self, name: str) -> Tensor:
        """The float64 value of one of them."""
        return self.values([name])[name]

    def overflows(self) -> bool:
        """Whether a value is too large for the dtype that it will be stored in."""
        for names in self.layers():
            for name, value in self.values(names).items():
                dtype = tensor_at(self._model, self.new_biases.get(name, name)).dtype
                if bool((value.isfinite() & ~value.to(dtype).isfinite()).any()):
                    return True
        return False


@dataclass(eq=False)
class _Group:
    """Changes to parameters that depend on each other, in their order: those of one layer.

    Attributes:
        changes: What its neighbours give it to take over.
        names: The parameters that change.
    """

    changes: tuple[_Change, ...]
    names: tuple[str, ...] = ()

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """New values, float64, by name."""
        made: dict[str, Tensor] = {}
        for change in self.changes:
            change.make(model, made)
        return made


@dataclass(frozen=True, eq=False)
class _ParameterChange:
    """What a weight, or part of one, and its bias take over.

    Attributes:
        target: The neighbour.
        weight: Its weight.
        biases: Its bias as far as it changes.
        scale: Of its channels, float64.
        shift: The same, before whatever multiplies the output of the neighbour.
    """

    target: Target
    weight: Part
    biases: tuple[Part, ...]
    scale: Tensor
    shift: Tensor

    @property
    def touched(self) -> list[str]:
        """Names of what it reads and writes."""
        return [self.weight.name, *(own.name for own in self.biases)]

    def written(self, model: nn.Module, group: _Group) -> list[str]:
        """Names of what it writes."""
        return self.touched

    def make(self, model: nn.Module, made: dict[str, Tensor]) -> None:
        """Change the values ``made`` so far."""
        assert self.target.consumer is not None
        whole = _current(model, made, self.weight.name)
        opened = self.weight.opened(whole)
        weight = self.weight.of(opened)
        bias = self._bias(model, made, like=weight)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        take = self.target.consumer.take_input if self.target.side == "next" else self.target.consumer.take_output
        taken = take(tensors, self.scale.to(weight.device), self.shift.to(weight.device))
        made[self.weight.name] = self.weight.closed(self.weight.put(opened, taken["weight"]))
        for own in self.biases:
            if self.target.new_bias:
                made.setdefault(own.name, whole.new_zeros(len(opened)))
            values = taken["bias"][own.channels.to(whole.device)]
            made[own.name] = own.put(_current(model, made, own.name), values)

    def _bias(self, model: nn.Module, made: Mapping[str, Tensor], like: Tensor) -> Tensor | None:
        """The bias before it, ``(O,)``; None where there is none."""
        if not self.biases or (self.target.new_bias and not any(own.name in made for own in self.biases)):
            return None
        bias = like.new_zeros(like.shape[0])
        for own in self.biases:
            bias[own.channels] = _current(model, made, own.name)[own.rows].to(bias)
        return bias


@dataclass(frozen=True, eq=False)
class _LayerChange:
    """What a module of a class with a consumer of its own takes over.

    Attributes:
        target: The neighbour.
        layer: Its module.
        scale: Of its channels, float64.
        shift: The same.
    """

    target: Target
    layer: Layer
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, target: Target, scale_shift: ScaleShift, layer: Layer) -> _LayerChange:
        """What ``layer`` takes over of a norm."""
        return cls(target, layer, *_share(scale_shift, target))

    @property
    def touched(self) -> list[str]:
        """Names of what it may read and write."""
        return [f"{self.layer.name}.{name}" for name in self.layer.tensors()]

    def written(self, model: nn.Module, group: _Group) -> list[str]:
        """Names of what it writes, which its consumer alone knows."""
        return list(group.values(model))

    def make(self, model: nn.Module, made: dict[str, Tensor]) -> None:
        """Change the values ``made`` so far."""
        layer = self.layer
        names = {name: f"{layer.name}.{name}" for name in layer.tensors()}
        tensors = {name: _current(model, made, full) for name, full in names.items()}
        like = next(iter(tensors.values()), self.scale)
        take = layer.consumer.take_input if self.target.side == "next" else layer.consumer.take_output
        for name, value in take(tensors, self.scale.to(like.device), self.shift.to(like.device)).items():
            if name not in tensors or value.shape != tensors[name].shape:
                kind, shape = type(layer.consumer).__name__, tuple(value.shape)
                expected = f"it has shape {tuple(tensors[name].shape)}" if name in tensors else "it has no such tensor"
                raise ValueError(
                    f"{kind}.{take.__name__} gives {layer.name} a {name!r} of shape {shape}, but {expected}"
                )
            made[names[name]] = wide(value)


_Change = _ParameterChange | _LayerChange


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


def gain_of(model: nn.Module, part: Part) -> Tensor:
    """Value of a LayerScale for each output channel that it multiplies, float64."""
    return wide(tensor_at(model, part.name).detach()).flatten()[part.rows]


def _current(model: nn.Module, made: Mapping[str, Tensor], name: str) -> Tensor:
    found = made.get(name)
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
    for names in solution.layers():
        on_use = [name for name in names if name not in solution.new_biases and _is_wide_on_use(model, name)]
        for name in on_use:
            _set_tensor(model, name, WideOnUse(tensor_at(model, name), partial(solution.value, name)))
        values = solution.values([name for name in names if name not in on_use])
        for name, value in values.items():
            if name in solution.new_biases:
                create_bias(model, name, solution.new_biases[name], len(value))
            _set_tensor(model, name, value.to(tensor_at(model, name), copy=True).contiguous())
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
    owner, leaf = _parent(model, name)
    if leaf in parameter_slots(owner):
        requires_grad = tensor_at(model, name).requires_grad
        setattr(owner, leaf, nn.Parameter(value, requires_grad))  # an LSTM notes that, and lists its weights anew
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
    zeros = torch.zeros(num_out, dtype=like.dtype, device=like.device)
    parameter_slots(owner)[leaf] = nn.Parameter(zeros, like.requires_grad)
    setattr(owner, NEW_BIASES, (*getattr(owner, NEW_BIASES, ()), leaf))


def set_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` at every one of ``names``."""
    for name in names:
        parent, leaf = _parent(model, name)
        child_slots(parent)[leaf] = module


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf
