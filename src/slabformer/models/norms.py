"""Norms by the names that models take as ``norm``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from slabformer.nn import PRepBN, RepBN

NormLayer = Callable[..., nn.Module]


def resolve_norm_layer(norm: str | NormLayer, eps: float) -> NormLayer:
    """Constructor ``norm(dim, device=, dtype=)`` for "prepbn", "repbn" or "layernorm"; any other callable as it is.

    Args:
        norm: Name or constructor.
        eps: LayerNorm's epsilon, also inside PRepBN; BatchNorm keeps its own.

    Raises:
        ValueError: If the name is unknown.
    """
    norms: dict[str, NormLayer] = {
        "prepbn": partial(PRepBN, eps=eps),
        "repbn": RepBN,
        "layernorm": partial(nn.LayerNorm, eps=eps),
    }
    if callable(norm):
        return norm
    if norm not in norms:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(norms)}, or pass a constructor")
    return norms[norm]
