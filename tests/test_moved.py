"""Modules answer to their old names for one release."""

from __future__ import annotations

import importlib
import sys

import pytest

from slabformer._moved import MOVED


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MOVED:
        monkeypatch.delitem(sys.modules, f"slabformer.{name}", raising=False)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_names_warn_and_hold_what_the_new_ones_hold(old: str) -> None:
    pytest.importorskip("transformers", reason="some of them need it")
    with pytest.warns(DeprecationWarning, match=f"slabformer.{old} has moved to slabformer.{MOVED[old][0]}"):
        module = importlib.import_module(f"slabformer.{old}")
    for new in MOVED[old]:
        held = importlib.import_module(f"slabformer.{new}")
        own = [name for name, value in vars(held).items() if getattr(value, "__module__", None) == held.__name__]
        assert own
        assert all(getattr(module, name) is getattr(held, name) for name in own)


@pytest.mark.usefixtures("forgotten")
def test_a_name_that_is_gone_says_where_it_was_looked_for() -> None:
    with pytest.warns(DeprecationWarning, match="has moved"):
        module = importlib.import_module("slabformer.deployment.variants")
    with pytest.raises(AttributeError, match=r"moved to slabformer.bench.ceiling and slabformer.deployment.compiled"):
        _ = module.nothing


def test_modules_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("slabformer.deployment.nothing")
