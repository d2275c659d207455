"""Which norms of a model were converted, in data: what it takes to convert a fresh one alike before its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

import slabformer as sf
from slabformer.nn import PRepBN, RepBN
from slabformer.settings import Fraction, NonEmptyStr, PositiveFloat, check_fields


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Norms that :func:`slabformer.convert_norms_` replaced with the same settings."""

    names: list[NonEmptyStr]
    """Of the modules."""
    progressive: bool
    """PRepBN, or RepBN from the start."""
    eps: PositiveFloat
    """RepBN's."""
    momentum: Fraction | None
    """RepBN's."""

    def __post_init__(self) -> None:
        check_fields(self)


def converted_norms(model: nn.Module) -> dict[str, PRepBN | RepBN]:
    """Every PRepBN and every RepBN outside of one, by each of its names."""
    norms = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (PRepBN, RepBN))
    }
    return {name: norm for name, norm in norms.items() if name.rpartition(".")[0] not in norms}


def describe(norms: Mapping[str, PRepBN | RepBN]) -> list[Conversion]:
    """The conversions that make ``norms`` of what stands in their places."""
    groups: dict[tuple[bool, float, float | None], list[str]] = {}
    for name, norm in norms.items():
        rep = norm.rep if isinstance(norm, PRepBN) else norm
        groups.setdefault((isinstance(norm, PRepBN), rep.eps, rep.momentum), []).append(name)
    return [Conversion(names=names, progressive=p, eps=eps, momentum=m) for (p, eps, m), names in groups.items()]


def convert_as_described_(model: nn.Module, conversions: Iterable[Conversion], title: str) -> None:
    """Convert the norms of a fresh ``model``, which ``title`` calls by its name, before its weights are loaded.

    Raises:
        ValueError: If it has no such norm.
    """
    for conversion in conversions:
        names = frozenset(conversion.names)
        found = sf.convert_norms_(
            model,
            lambda _, name: name in names,  # noqa: B023 - called before the next round
            norm="prepbn" if conversion.progressive else "repbn",
            eps=conversion.eps,
            momentum=conversion.momentum,
        )
        if names - set(found):
            missing = min(names - set(found))
            raise ValueError(f"{title} has no norm {missing!r} to convert; is its library another version?")
