"""Which modules are norms with a per-channel affine map in eval mode, and what that map is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._torch import BatchNorm
from slabformer.nn import PRepBN, RepBN
from slabformer.nn.affine import Affine, Folded
from slabformer.ops.precision import wide, wide_device

ScaleShift = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Norm:
    """One norm of a model.

    Attributes:
        index: Its number, by which a traced graph refers to it.
        names: All its names; several when it is tied.
        module: The module itself.
        num_channels: ``C``.
        channel_dim: Axis of the channels, -1 or 1.
        reference: A tensor of its device and dtype.
    """

    index: int
    names: tuple[str, ...]
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
        return next(row.scale_shift(self.module) for row in NORM_TYPES if row.matches(self.module))

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance, ``(C,)`` each; None where it has none, as an Affine."""
        holder = self.module.rep if isinstance(self.module, PRepBN) else self.module
        mean, variance = getattr(holder, "running_mean", None), getattr(holder, "running_var", None)
        return (mean, variance) if isinstance(mean, Tensor) and isinstance(variance, Tensor) else None


@dataclass(frozen=True)
class NormType:
    """A kind of norm that fuse knows: what it looks like and its map in eval mode."""

    matches: Callable[[Any], bool]
    scale_shift: Callable[[Any], ScaleShift]
    num_channels: Callable[[Any], int]
    channel_dim: Callable[[Any], int]


#: what timm's norms with an activation inside run behind their map, in this order
_TAIL = ("drop", "act")


def tail_of(module: nn.Module) -> nn.Module | None:
    """What a norm runs on the result of its map, as timm's BatchNormAct2d does; None for nothing."""
    if isinstance(module, (Affine, Folded)):
        return module.then
    children = [module._modules[name] for name in _TAIL if name in module._modules]
    tail = [child for child in children if child is not None and not isinstance(child, nn.Identity)]
    return nn.Sequential(*tail) if tail else None


def _is_batch_norm(module: nn.Module) -> bool:
    """BatchNorm with running statistics, proper or timm's; other subclasses may compute anything."""
    plain = type(module).forward in (BatchNorm.forward, nn.SyncBatchNorm.forward) or _has_tail(module)
    return isinstance(module, BatchNorm) and plain and isinstance(module.running_mean, Tensor)


def _has_tail(module: nn.Module) -> bool:
    """Whether it holds a dropout and an activation, and these hold no tensors, which would change their names."""
    inside = [tensor for child in module.children() for tensor in (*child.parameters(), *child.buffers())]
    return module._modules.keys() == set(_TAIL) and not inside


def _batch_norm_map(module: BatchNorm) -> ScaleShift:
    assert module.running_mean is not None
    assert module.running_var is not None
    scale = (wide(module.running_var) + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * wide(module.weight)
    shift = -wide(module.running_mean) * scale
    return scale.detach(), (shift if module.bias is None else shift + wide(module.bias)).detach()


def _is_frozen_batch_norm(module: nn.Module) -> bool:
    """A BatchNorm whose gain, offset and statistics are all buffers, as detectors have: torchvision's, DETR's."""
    bare = not module._parameters and (not module._modules or _has_tail(module))
    return bare and {name for name, _ in module.named_buffers()} == {"weight", "bias", "running_mean", "running_var"}


@torch.no_grad()
def _probed_map(module: nn.Module) -> ScaleShift:
    """The map of a module that does not say what it adds to its variance, by what it makes of 0 and 1."""
    one = torch.ones(1, len(module.bias), 1, 1, dtype=torch.float64, device=wide_device(module.bias.device))  # type: ignore[arg-type]
    double = copy.deepcopy(module).to(one.device).double()
    for name in double._modules:
        double._modules[name] = nn.Identity()  # what comes after the map
    shift = double(0 * one).flatten()
    return double(one).flatten() - shift, shift


#: a new kind of norm is one row
NORM_TYPES: tuple[NormType, ...] = (
    NormType(
        lambda m: isinstance(m, (PRepBN, RepBN)),
        lambda m: m.scale_shift(),
        lambda m: m.normalized_shape[0],
        lambda m: m.rep.channel_dim if isinstance(m, PRepBN) else m.channel_dim,
    ),
    NormType(
        lambda m: isinstance(m, Affine),
        lambda m: (wide(m.weight.detach()), wide(m.bias.detach())),
        lambda m: m.normalized_shape[0],
        lambda m: m.channel_dim,
    ),
    NormType(_is_batch_norm, _batch_norm_map, lambda m: m.num_features, lambda m: 1),
    NormType(_is_frozen_batch_norm, _probed_map, lambda m: len(m.bias), lambda m: 1),
)


def find_norms(model: nn.Module) -> list[Norm]:
    """Every norm of ``model`` in its order, tied ones once; the children of a PRepBN belong to it."""
    names: dict[nn.Module, list[str]] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(inside) and any(row.matches(module) for row in NORM_TYPES):
            names.setdefault(module, []).append(name)
            inside += (f"{name}.",)
    return [_describe(index, module, tuple(found)) for index, (module, found) in enumerate(names.items())]


def _describe(index: int, module: nn.Module, names: tuple[str, ...]) -> Norm:
    row = next(row for row in NORM_TYPES if row.matches(module))
    tensors = [*module.parameters(), *module.buffers()]
    reference = next((t for t in (getattr(module, "weight", None), *tensors) if isinstance(t, Tensor)), torch.empty(0))
    return Norm(index, names, module, row.num_channels(module), row.channel_dim(module), reference)
