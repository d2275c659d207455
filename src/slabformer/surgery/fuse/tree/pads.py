"""Pads that a norm folds through, because they may be told what to pad with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slabformer.nn.norms import ScaleShift
from slabformer.nn.padding import PadTokens
from slabformer.ops.precision import wide


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
