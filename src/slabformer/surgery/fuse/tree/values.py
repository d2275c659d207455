"""The values that a decision makes of a model's parameters: algebra in float64, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from slabformer.nn.norms import ScaleShift
from slabformer.ops.affine import compose, spread
from slabformer.ops.precision import WIDE_ON_USE_FROM, wide
from slabformer.surgery.fuse.tree.norms import Layer, Norm, Pad, fill_after, fill_before, find_layers, find_pads
from slabformer.surgery.fuse.tree.plan import SCALES, Edit, Part, Target, share


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
    owner, leaf = owner_of(model, name)
    return getattr(owner, leaf)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter, buffer or child called ``name``, and its name there."""
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf
