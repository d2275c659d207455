"""The main job: what it writes, and (slow) how well it does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from csv_files import csv_rows

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from slabformer.cli.quickstart import parser
from slabformer.cli.train import parser as train_parser
from slabformer.quickstart.config import QuickstartConfig
from slabformer.quickstart.job import BASELINE, OUTPUTS, SLAB, recipe, run_quickstart
from slabformer.tasks.engine.manifest import Manifest
from slabformer.tasks.saved_model import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder that holds what an earlier one wrote, and a file of somebody else's."""
    output = tmp_path_factory.mktemp("quickstart")
    Manifest(output, "quickstart").write(OUTPUTS)
    for name in (*OUTPUTS, "mine.txt"):
        (output / name).write_text("earlier")
    run_quickstart(QuickstartConfig(output=str(output), epochs=2, bench_seconds=0.05, compiled=False))
    return output


def test_summary_holds_every_promised_figure(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    promised = {
        "slab_accuracy",
        "baseline_accuracy",
        "fused_difference",
        "norms_total",
        "norms_folded",
        "seconds",
        "speeds",
    }
    assert promised <= summary.keys()
    assert summary["norms_folded"] == summary["norms_total"] == 9
    assert 0 < summary["fused_difference"] <= 1e-5
    assert {row["variant"] for row in summary["speeds"]} == {"as given", "fused", "LayerNorm baseline", "ceiling"}
    assert all(row["images_per_second"] > 0 for row in summary["speeds"])


def test_saved_models_load_and_the_fused_one_has_no_norm(folder: Path) -> None:
    unfused, _ = load_model(folder / "model.safetensors")
    fused, _ = load_model(folder / "fused.safetensors")
    baseline, _ = load_model(folder / "baseline.safetensors")

    def norms(model: object) -> int:
        return sum("Norm" in type(m).__name__ or "BN" in type(m).__name__ for m in model.modules())  # type: ignore[attr-defined]

    assert norms(unfused) == 27  # nine PRepBN, each a LayerNorm and a RepBN
    assert norms(fused) == 0
    assert norms(baseline) == 9


def test_metrics_hold_both_runs_epoch_by_epoch(folder: Path) -> None:
    rows = csv_rows(folder / "metrics.csv")
    assert [(row["model"], float(row["epoch"])) for row in rows] == [(SLAB, 1), (SLAB, 2), (BASELINE, 1), (BASELINE, 2)]
    assert all(float(row["train_loss"]) > 0 for row in rows)


def test_settings_and_events_are_there(folder: Path) -> None:
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["quickstart"]["epochs"] == 2
    assert settings[SLAB]["model"]["name"] == SLAB
    assert list(folder.glob("*/events.out.tfevents.*"))


def test_report_needs_nothing_beside_it(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]+", page)
    assert "<script" not in page
    assert not re.findall(r"\$[a-z_]+", page), "a placeholder was left"


def test_what_an_earlier_run_wrote_is_replaced_and_other_files_are_spared(folder: Path) -> None:
    assert (folder / "mine.txt").read_text() == "earlier"
    assert [name for name in OUTPUTS if (folder / name).read_bytes() == b"earlier"] == []


@pytest.mark.slow
def test_a_second_run_replaces_the_first_and_spares_other_files(folder: Path) -> None:
    (folder / "mine.txt").write_text("kept")
    before = (folder / "metrics.csv").read_text()
    run_quickstart(QuickstartConfig(output=str(folder), epochs=1, bench_seconds=0.05, compiled=False))
    assert (folder / "mine.txt").read_text() == "kept"
    assert (folder / "metrics.csv").read_text() != before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; give another output folder"):
        run_quickstart(QuickstartConfig(output=str(tmp_path / "taken")))


def test_recipe_file_is_the_quickstarts_recipe() -> None:
    parsed = train_parser().parse_args(["--config", str(ROOT / "recipes" / "digits.yaml")])
    from_file = json.loads(json.dumps(parsed.as_dict(), default=str))
    ours = replace(recipe(SLAB, QuickstartConfig()), output="runs/digits", overwrite=False).to_dict()
    for key, value in json.loads(json.dumps(ours)).items():
        assert from_file[key] == value, key


def test_options_are_the_jobs_settings() -> None:
    given = parser().parse_args(["--epochs", "3", "--compiled", "false"])
    assert QuickstartConfig(**vars(given)) == QuickstartConfig(epochs=3, compiled=False)


@pytest.mark.slow
def test_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    result = run_quickstart(QuickstartConfig(output=str(tmp_path), bench_seconds=0.5, compiled=False))
    summary = result.summary()
    assert summary["slab_accuracy"] >= 0.97
    assert summary["slab_accuracy"] >= summary["baseline_accuracy"] - 4 / 360
