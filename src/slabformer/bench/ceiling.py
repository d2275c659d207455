"""The ceiling that a model is held against: itself with norms and attention deleted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import Tensor, nn

from slabformer.nn.affine import Affine, Folded
from slabformer.nn.norms import type_of
from slabformer.surgery.recognise import NormForm, recognise


class ProjectionsOnly(nn.Module):
    """An attention whose tokens no longer meet: its projections cost what they did, all else is gone.

    Args:
        attention: Holds ``proj`` and either ``qkv`` or ``q`` and ``kv``, as in timm's models and ours; its own
            reduction of keys and values (``sr``) goes too, and with it the tokens that it took away.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        assert isinstance(attention.proj, nn.Linear)
        self.proj = attention.proj
        self.input: nn.Module = getattr(attention, "qkv", None) or attention.get_submodule("q")
        self.reduced: nn.Module | None = getattr(attention, "kv", None)
        reduction = getattr(attention, "sr", None)
        self.reduction = math.prod(reduction.stride) if isinstance(reduction, nn.Conv2d) else 1

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """``(B, ..., C)`` to the same: the projection of the values, plus the queries where those stand alone."""
        width = self.proj.in_features
        first = self.input(x)[..., -width:]
        if self.reduced is None:
            return self.proj(first)
        tokens = x.flatten(1, -2)
        values = self.reduced(tokens[:, : max(1, tokens.shape[1] // self.reduction)])[..., -width:]
        if self.reduction == 1:
            return self.proj(first + values.view_as(first))
        return self.proj(first + values.mean(1).view(len(x), *[1] * (x.ndim - 2), width))


def ceiling_of(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with norms and attention deleted: as fast as it could get if both cost nothing.

    Raises:
        ValueError: If no attention is recognised, since the ceiling would then be none.
    """
    ceiling = copy.deepcopy(model).eval()
    attentions = _outermost(ceiling, _is_attention)
    for name, attention in attentions.items():
        _replace(ceiling, name, ProjectionsOnly(attention))
    for name, norm in _outermost(ceiling, _is_norm).items():
        _replace(ceiling, name, _nothing_left_of(norm))
    if not attentions:
        raise ValueError(
            f"no attention with proj and qkv, or proj, q and kv, in {type(model).__name__}: no ceiling to measure"
        )
    return ceiling


def _outermost(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Modules that are wanted, by name, without those inside another one that is."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not any(name.startswith(f"{outer}.") for outer in found) and is_wanted(module):
            found[name] = module
    return found


def _is_attention(module: nn.Module) -> bool:
    def linear(name: str) -> bool:
        return isinstance(getattr(module, name, None), nn.Linear)

    return linear("proj") and (linear("qkv") or (linear("q") and linear("kv")))


def _is_norm(module: nn.Module) -> bool:
    row = type_of(module)
    if isinstance(module, (Affine, Folded)) or (row is not None and row.build is not None):
        return True
    return isinstance(recognise(module), NormForm)


def _nothing_left_of(norm: nn.Module) -> Folded:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return Folded(int(getattr(norm, "normalized_shape", (1,))[0]))
    return Folded(weight.numel(), eps=getattr(norm, "eps", 1e-5), device=weight.device, dtype=weight.dtype)


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, replacement)
