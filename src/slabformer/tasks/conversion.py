"""Which norms of a model were converted, in data: what it takes to convert a fresh one alike before its weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

import slabformer as sf
from slabformer._norm_names import NormName
from slabformer.nn import PRepBN, RepBN
from slabformer.nn.norms import is_from_here, norm_type, norm_types, norms_of, type_of
from slabformer.settings import Eta, Fraction, NonEmptyStr, PositiveFloat, check_fields
from slabformer.surgery.convert import find_layer_norms, was_converted

logger = logging.getLogger(__name__)
#: what a norm without running statistics is noted with
EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Norms that :func:`slabformer.convert_norms_` replaced with the same settings."""

    names: list[NonEmptyStr]
    """Of the modules."""
    norm: NormName
    """What they became."""
    eps: PositiveFloat
    """BatchNorm's."""
    momentum: Fraction | None
    """BatchNorm's."""

    def __post_init__(self) -> None:
        check_fields(self)


def as_written_now(conversions: Any) -> Any:
    """``conversions`` from JSON, those of 0.1 with ``norm`` where these had ``progressive``; all else as it is."""
    if not isinstance(conversions, list):
        return conversions
    return [_as_written_now(row) if isinstance(row, Mapping) else row for row in conversions]


def _as_written_now(row: Mapping[str, Any]) -> dict[str, Any]:
    if "norm" in row or not isinstance(row.get("progressive"), bool):
        return dict(row)
    return {"norm": "prepbn" if row["progressive"] else "repbn"} | {k: v for k, v in row.items() if k != "progressive"}


def buildable_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every norm that the table can build, by each of its names; what is inside one belongs to it."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        row = type_of(module)
        if row is not None and row.build is not None and not name.startswith(inside):
            inside += (f"{name}." if name else "",)
            yield name, module


class NormSettings(Protocol):
    """What recipes of images say about norms."""

    norm: str | None
    eta: Eta | None
    convert_norms: bool


def norm_arguments(settings: NormSettings, is_ours: bool) -> dict[str, Any]:
    """What a model of this package is told about its norms; others are converted once they are built."""
    if settings.convert_norms or not is_ours:
        return {}
    return {name: value for name in ("norm", "eta") if (value := getattr(settings, name)) is not None}


def apply_norms_(model: nn.Module, settings: NormSettings, arguments: Mapping[str, Any], title: str) -> None:
    """Convert the norms of a new ``model`` as ``settings`` say, unless it was built so, and log which there are.

    Args:
        model: Edited in place.
        settings: Of the recipe.
        arguments: That it was built with.
        title: What errors and the log call it.

    Raises:
        ValueError: If nothing can be converted and its norms are of another kind, or ``eta`` has no norm to be of.
    """
    norm = settings.norm or ("prepbn" if settings.convert_norms else None)
    if norm is None and settings.eta is not None and "eta" not in arguments:
        raise ValueError(f"model.eta is for PRepBN and RepBN; say with model.norm that {title} is to have them")
    if norm is not None and arguments.get("norm") != norm:
        row = norm_type(norm)
        if settings.eta is not None or set(count_norms(model)) != {row.title}:
            logger.info("converted %d norms of %s", len(sf.convert_norms_(model, norm=norm, eta=settings.eta)), title)
    counts = count_norms(model).most_common()
    logger.info("norms of %s: %s", title, ", ".join(f"{count} {kind}" for kind, count in counts) or "none")


def count_norms(model: nn.Module) -> Counter[str]:
    """How many norms of which kind there are, whatever their classes; tied ones count once."""
    forms = {model.get_submodule(name): norm_types()[form.kind] for name, form in find_layer_norms(model)[0].items()}
    forms |= {model.get_submodule(name): row for name, row in norms_of(model)}
    return Counter(row.title for row in forms.values())


def converted_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Norms that a model of another library holds because they were put there, by each of their names.

    LayerNorm and RMSNorm are torch's, so that only :func:`slabformer.convert_norms_` tells.
    """
    return {name: norm for name, norm in buildable_norms(model) if was_converted(norm) or is_from_here(norm)}


def describe(norms: Mapping[str, nn.Module]) -> list[Conversion]:
    """The conversions that make ``norms`` of what stands in their places."""
    groups: dict[tuple[str, float, float | None], list[str]] = {}
    for name, norm in norms.items():
        row, rep = type_of(norm), norm.rep if isinstance(norm, PRepBN) else norm
        assert row is not None
        settings = (rep.eps, rep.momentum) if isinstance(rep, RepBN) else (EPS, MOMENTUM)
        groups.setdefault((row.name, *settings), []).append(name)
    return [
        Conversion(names=names, norm=norm, eps=eps, momentum=momentum)
        for (norm, eps, momentum), names in groups.items()
    ]


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
            norm=conversion.norm,
            eps=conversion.eps,
            momentum=conversion.momentum,
        )
        if names - set(found):
            missing = min(names - set(found))
            raise ValueError(f"{title} has no norm {missing!r} to convert; is its library another version?")
