"""A classifier's weights into a detector's backbone: all of them, but for what only one of the two has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slabformer.models.detection.backbones import CLASSIFIER_ONLY, Backbone
from slabformer.models.official import State, load_published, published_names, read_published

BODY = "body."


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
    state = read_published(source)
    own = backbone.body.state_dict()
    published = published_names(backbone, "repbn")
    if sum(name in state for name in own) >= sum(name in state for name in published):
        return _load_own(backbone, state)
    expected = {name: ours for name, ours in published.items() if ours is not None and not ours.startswith(BODY)}
    missing = [ours for name, ours in expected.items() if name not in state]
    dropped = [name for name in state if any(re.search(p, name) for p in backbone.published_layout.dropped)]
    _fit_tables(backbone, state, {name: str(ours).removeprefix(BODY) for name, ours in published.items()})
    whole = backbone.state_dict()
    load_published(backbone, {name: whole[ours] for name, ours in expected.items()} | state)
    return LoadReport(missing, dropped)


def _load_own(backbone: Backbone, state: State) -> LoadReport:
    own = backbone.body.state_dict()
    _fit_tables(backbone, state, {name: name for name in own})
    dropped = [name for name in state if name not in own and any(re.search(p, name) for p in CLASSIFIER_ONLY)]
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
    return LoadReport([name for name in backbone.state_dict() if not name.startswith(BODY)], dropped)


def _fit_tables(backbone: Backbone, state: State, names: Mapping[str, str]) -> None:
    """Resample position tables of ``state``, whose ``names`` map to the body's, where the body has a method for it."""
    fit = getattr(backbone.body, "fit_tables", None)
    if fit is not None:
        fit(state, names)
