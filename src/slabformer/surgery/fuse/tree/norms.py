"""What a fold may concern in a module tree: norms with a per-channel affine map, pads, and registered layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._torch import child_slots
from slabformer.nn.affine import Affine, Folded
from slabformer.nn.foreign_norms import TAIL
from slabformer.nn.norms import NormType, ScaleShift, type_of
from slabformer.nn.padding import PadTokens
from slabformer.nn.prepbn import PRepBN
from slabformer.ops.precision import wide
from slabformer.surgery.fuse.consumers import ModuleConsumer, consumer_of


@dataclass(frozen=True)
class Norm:
    """One norm of a model.

    Attributes:
        index: Its number, by which a traced graph refers to it.
        names: All its names; several when it is tied.
        kind: Its row in the table of norms.
        module: The module itself.
        num_channels: ``C``.
        channel_dim: Axis of the channels, -1 or 1.
        reference: A tensor of its device and dtype.
    """

    index: int
    names: tuple[str, ...]
    kind: NormType
    module: Any
    num_channels: int
    channel_dim: int
    reference: Tensor

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def scale_shift(self) -> ScaleShift:
        """The map of eval mode, float64."""
        assert self.kind.scale_shift is not None
        return self.kind.scale_shift(self.module)

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance, ``(C,)`` each; None where it has none, as an Affine."""
        holder = self.module.rep if isinstance(self.module, PRepBN) else self.module
        mean, variance = getattr(holder, "running_mean", None), getattr(holder, "running_var", None)
        return (mean, variance) if isinstance(mean, Tensor) and isinstance(variance, Tensor) else None


def tail_of(module: nn.Module) -> nn.Module | None:
    """What a norm runs on the result of its map, as timm's BatchNormAct2d does; None for nothing."""
    if isinstance(module, (Affine, Folded)):
        return module.then
    children = [child_slots(module)[name] for name in TAIL if name in child_slots(module)]
    tail = [child for child in children if child is not None and not isinstance(child, nn.Identity)]
    return nn.Sequential(*tail) if tail else None


def find_norms(model: nn.Module) -> list[Norm]:
    """Every norm of ``model`` in its order, tied ones once; the children of a PRepBN belong to it."""
    names: dict[nn.Module, list[str]] = {}
    kinds: dict[nn.Module, NormType] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside) or (kind := type_of(module)) is None or kind.scale_shift is None:
            continue
        names.setdefault(module, []).append(name)
        kinds[module] = kind
        inside += (f"{name}.",)
    return [_describe(index, tuple(names[module]), kind, module) for index, (module, kind) in enumerate(kinds.items())]


def _describe(index: int, names: tuple[str, ...], kind: NormType, module: nn.Module) -> Norm:
    tensors = [*module.parameters(), *module.buffers()]
    reference = next((t for t in (getattr(module, "weight", None), *tensors) if isinstance(t, Tensor)), torch.empty(0))
    return Norm(index, names, kind, module, kind.num_channels(module), kind.channel_dim(module), reference)


@dataclass(frozen=True)
class Pad:
    """One :class:`PadTokens` of a model.

    Attributes:
        index: Its number, by which a traced graph refers to it.
        names: All its names; several when it is tied.
        module: The module itself.
    """

    index: int
    names: tuple[str, ...]
    module: PadTokens

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def fill(self) -> Tensor:
        """What it pads with, float64 ``(C,)``."""
        value = self.module.value
        return torch.zeros(self.module.dim, dtype=torch.float64) if value is None else wide(value.detach())


def find_pads(model: nn.Module) -> list[Pad]:
    """Every pad of ``model`` in its order, tied ones once."""
    names: dict[PadTokens, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PadTokens):
            names.setdefault(module, []).append(name)
    return [Pad(index, tuple(found), module) for index, (module, found) in enumerate(names.items())]


def fill_before(fill: Tensor, norm: ScaleShift) -> Tensor:
    """What ``x * scale + shift`` sends to ``fill``; infinite where nothing is, 0 where everything is."""
    scale, shift = norm
    missing = fill.to(shift.device) - shift
    return torch.where(missing == 0, missing, missing / scale)


def fill_after(fill: Tensor, norm: ScaleShift) -> Tensor:
    """What ``x * scale + shift`` sends ``fill`` to."""
    scale, shift = norm
    return fill.to(shift.device) * scale + shift


@dataclass(frozen=True)
class Layer:
    """One module of a class that has a consumer of its own.

    Attributes:
        index: Its number, by which a traced graph refers to it.
        name: The first of its names.
        module: The module itself.
        consumer: What takes norms over for it.
    """

    index: int
    name: str
    module: nn.Module
    consumer: ModuleConsumer

    def tensors(self) -> dict[str, Tensor]:
        """Its floating point parameters and buffers by name inside it."""
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        return {name: tensor for name, tensor in named if tensor.is_floating_point()}


def find_layers(model: nn.Module) -> list[Layer]:
    """Every registered layer of ``model`` in its order; those inside another belong to it."""
    found: list[Layer] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        consumer = None if name.startswith(inside) else consumer_of(module)
        if consumer is not None:
            found.append(Layer(len(found), name, module, consumer))
            inside += (f"{name}.",)
    return found
