"""Modules, attributes, arguments and settings answer to their old names for one release."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from bench_files import MACHINE
from slabformer._moved import MOVED, takes_old_names
from slabformer.bench.report import BenchReport
from slabformer.measure.rows import Measurement
from slabformer.quickstart.job import _written_without_manifest
from slabformer.tasks.detection.config import TrainConfig
from slabformer.tasks.engine.folder import RunFolder


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


def test_old_attributes_and_variants_answer_with_a_warning() -> None:
    row = Measurement(
        variant="LayerNorm baseline", mode="eager", batch_size=1, p50_ms=1.0, p90_ms=1.0, images_per_second=1.0,
        memory_mib=None, parameters=1, macs=1, over_baseline=1.5, over_given=1.0, of_ceiling=None,
    )  # fmt: skip
    with pytest.warns(DeprecationWarning, match="'over_twin' is now called 'over_baseline'"):
        assert row.over_twin == 1.5
    with pytest.raises(AttributeError, match="'Measurement' object has no attribute 'over_all'"):
        _ = row.over_all
    assert copy.copy(row) == row
    report = BenchReport(model="one", machine=MACHINE, measurements=[row])
    with pytest.warns(DeprecationWarning, match="'LayerNorm twin' is now called 'LayerNorm baseline'"):
        assert report.find("LayerNorm twin", "eager", 1) is row


def test_old_arguments_are_taken_with_a_warning() -> None:
    @takes_old_names
    def compare(model: str, *, baseline: str | None = None) -> tuple[str, str | None]:
        return model, baseline

    assert compare("a", baseline="b") == ("a", "b")
    with pytest.warns(DeprecationWarning, match="'twin' is now called 'baseline'"):
        assert compare("a", twin="b") == ("a", "b")


def test_a_recipe_and_a_run_with_the_old_setting_go_on(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="'twin' is now called 'baseline'"):
        config = TrainConfig(twin=True, output=str(tmp_path / "run"))
    assert config.baseline is True
    now = config.to_dict()
    assert now["baseline"] is True
    assert "twin" not in now
    old = {name: value for name, value in now.items() if name != "baseline"} | {"twin": False}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(old))))
    assert RunFolder(tmp_path / "run", now, config.harmless()).look() == "new"


def test_what_an_old_quickstart_wrote_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("quickstart: {}\n")
    assert "twin.safetensors" in _written_without_manifest(tmp_path)
