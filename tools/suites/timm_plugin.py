"""pytest plugin: timm's tests of every model, for ours alone.

A model `slab_X` is excluded where timm excludes `X`: tokens without a map (`slab_deit_*`, as timm's `deit_*`) are held
to the tests of models that return no map. Families with `forward_intermediates` are added to timm's list of those.
Tests that download weights are left out, as on timm's own CI, and so are those of single models of timm's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import timm

import slabformer.models  # noqa: F401  (registers ours)

FAMILIES = ("swin", "pvt", "cswin")
_list_models = timm.list_models
Filters = str | Sequence[str]


@functools.cache
def our_names() -> frozenset[str]:
    """Names that the package registers."""
    names = _list_models()
    return frozenset(n for n in names if timm.model_entrypoint(n).__module__.startswith("slabformer.models."))


def list_models(
    filter: Filters = "", module: Filters = "", pretrained: bool = False, exclude_filters: Filters = "", **kwargs: Any
) -> list[str]:
    """timm's function, for our models alone."""
    if not isinstance(module, str):
        module = [*module, *FAMILIES]
    names = _list_models(_with_ours(filter), module, pretrained, _with_ours(exclude_filters), **kwargs)
    return [name for name in names if name in our_names()]


def _with_ours(patterns: Filters) -> Filters:
    if isinstance(patterns, str):
        patterns = [patterns] if patterns else []
    return [*patterns, *(f"slab_{pattern}" for pattern in patterns)]


timm.list_models = list_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not about our models, or downloads."""
    chosen, left = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        ours = callspec is not None and callspec.params.get("model_name") in our_names()
        (left if not ours or "_pretrained[" in item.name else chosen).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = chosen
