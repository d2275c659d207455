"""A classifier's weights into a detector's backbone: all of them, but for what only one of the two has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from slabformer.models.detection.backbones import CLASSIFIER_ONLY, Backbone
from slabformer.models.weights.official import PublishedLayout, State, load_published, published_names, read_published


class LoadReport(NamedTuple):
    """What :func:`load_backbone_weights` did not load."""

    missing: list[str]
    """Names of the backbone that the file has nothing for: output norms, a token pyramid."""
    dropped: list[str]
    """Names of the file that a backbone has no use for: final norm, head, masks."""


def load_backbone_weights(backbone: Backbone, source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load a classifier's weights, or a published detection backbone's; position tables are resampled.

    Afterwards gamma is what it was in a state dict of this package, and 0 after a published one, whose norms had
    finished.

    Args:
        backbone: From :func:`slabformer.models.detection.backbones.create_backbone`; edited in place.
        source: A published file or its contents, or a state dict of the same model in this package (or timm).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or anything else than expected is missing or left over; nothing is changed
            then.
    """
    state, body = read_published(source), backbone.body
    own = body.state_dict().keys()
    published = published_names(body, "repbn").keys() | published_names(body, "prepbn").keys()
    if len((own - published) & state.keys()) >= len((published - own) & state.keys()):
        return _load_own(backbone, state)
    if {backbone.published_layout.name(name) for name in _beside_body(backbone)} & state.keys():  # a detector's
        load_published(backbone, state)
        return LoadReport([], _matching(state, backbone.published_layout.dropped))
    dropped = _matching(state, CLASSIFIER_ONLY)
    state = {name: value for name, value in state.items() if name not in dropped}
    _fit_tables(body, state)
    load_published(body, state)
    layout: PublishedLayout = getattr(body, "published_layout", PublishedLayout())
    return LoadReport(_beside_body(backbone), dropped + _matching(state, layout.dropped))


def _load_own(backbone: Backbone, state: State) -> LoadReport:
    own = backbone.body.state_dict()
    _fit_tables(backbone.body, state, {name: name for name in own})
    dropped = [name for name in _matching(state, CLASSIFIER_ONLY) if name not in own]
    problems = {
        "missing": [name for name in own if name not in state],
        "left over": [name for name in state if name not in own and name not in dropped],
        "of another shape": [name for name in own if name in state and state[name].shape != own[name].shape],
    }
    found = [f"{len(names)} {what} (first: {names[0]})" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"weights do not fit the backbone: {', '.join(found)}; build it with the name and arguments of the model "
            "that they are from"
        )
    backbone.body.load_state_dict({name: state[name] for name in own})
    return LoadReport(_beside_body(backbone), dropped)


def _fit_tables(body: nn.Module, state: State, names: Mapping[str, str] | None = None) -> None:
    """Resample position tables of ``state``, whose ``names`` map to the body's, where it has a method for that."""
    fit = getattr(body, "fit_tables", None)
    if fit is not None:
        fit(state, names)


def _matching(state: State, patterns: tuple[str, ...]) -> list[str]:
    return [name for name in state if any(re.search(pattern, name) for pattern in patterns)]


def _beside_body(backbone: Backbone) -> list[str]:
    return [name for name in backbone.state_dict() if not name.startswith("body.")]
