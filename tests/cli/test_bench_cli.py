"""`slab bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csv_files import csv_rows
from slabformer.cli.main import main
from slabformer.figures.comparison import compare_files
from small_models import saved

QUICK = ["--no-compile", "--batch-sizes", "2", "--seconds", "0.02"]


def bench(folder: Path, *arguments: str) -> dict:
    assert main(["bench", *arguments, *QUICK, "--output", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "bench.json", "bench.png"}
    return json.loads((folder / "bench.json").read_text())


def test_a_saved_model_is_held_against_the_baseline_that_its_name_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path / "out", str(saved(tmp_path / "model.safetensors")))
    assert [row["variant"] for row in found["measurements"]] == ["as given", "fused", "LayerNorm baseline", "ceiling"]
    assert {row["mode"] for row in found["measurements"]} == {"eager"}
    printed = capsys.readouterr().out
    for text in ("speed of slab_deit_micro", "images/s", "of ceiling", "norms folded"):
        assert text in printed


def test_any_model_is_converted_and_is_its_own_baseline(tmp_path: Path) -> None:
    found = bench(tmp_path / "out", "deit_micro", "--convert", "--threads", "1")
    assert len(found["measurements"]) == 4
    assert found["machine"]["threads"] == 1
    assert found["equality"]["max_rel"] > 0


def test_the_baseline_can_be_left_out(tmp_path: Path) -> None:
    found = bench(tmp_path / "out", "slab_deit_micro", "--against", "none")
    assert [row["variant"] for row in found["measurements"]] == ["as given", "fused", "ceiling"]
    assert all(row["over_baseline"] is None for row in found["measurements"])


def test_the_old_name_of_the_baseline_is_taken_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="'twin' is now called 'baseline'"):
        found = bench(tmp_path / "out", "slab_deit_micro", "--against", "twin")
    assert "LayerNorm baseline" in {row["variant"] for row in found["measurements"]}


def zoo(folder: Path, *arguments: str) -> list[dict[str, str]]:
    assert main(["bench", "--models", *arguments, *QUICK, "--output", str(folder)]) == 0
    return csv_rows(folder / "bench.csv")


def test_many_models_make_one_table_and_are_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = zoo(tmp_path, "slab_deit_micro", "deit_micro_prepbn", "--against", "baseline")
    assert {row["model"] for row in first} == {"slab_deit_micro", "deit_micro_prepbn"}
    assert {row["variant"] for row in first} == {"as given", "fused", "LayerNorm baseline", "ceiling"}
    assert "fused over baseline" in (tmp_path / "bench.md").read_text()
    assert "slab_deit_micro" in capsys.readouterr().out
    monkeypatch.setattr("slabformer.bench.compare.compare", lambda *_, **__: pytest.fail("measured again"))
    assert zoo(tmp_path, "slab_deit_micro") == first
    pairs = compare_files([tmp_path / "bench.csv"]).pairs  # `slab report` reads the table
    assert {pair.fused.model for pair in pairs} == {"slab_deit_micro", "deit_micro_prepbn"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["slab_deit_micro", "--against", "deit_micr"], "did you mean 'deit_micro'?"),
        (["slab_deit_micro", "--batch-sizes", "0"], "at least 1"),
        (["slab_deit_micro", "--device", "cuda:99"], "no device 'cuda:99' here"),
        ([], "give one model, or several with --models"),
        (["slab_deit_micro", "--models", "slab_*"], "give one model, or several with --models"),
        (["--models", "slab_dit_micro"], "did you mean 'slab_deit_micro'?"),
        (["--models", "slab_deit_micro", "--against", "deit_micr"], "did you mean 'deit_micro'?"),
        (["--models", "slab_deit_micro", "--pretrained"], "are for one model"),
    ],
    ids=["unknown-baseline", "batch-size", "device", "none", "both", "pattern", "zoo-baseline", "zoo-weights"],
)
def test_mistakes_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert printed.count("\n") == 1


@pytest.mark.usefixtures("_compiler")
def test_deploy_tells_what_each_step_gained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(saved(tmp_path / "model.safetensors"))
    assert main(["bench", model, "--deploy", "--dtype", "bfloat16", *QUICK, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "deploy.json").read_text())
    names = [step["name"] for step in report["steps"]]
    assert names == ["as given", "fused", "bfloat16", "channels last", "in C++"]
    assert report["taken"] in [step["name"] for step in report["steps"]]
    assert "taken: " in capsys.readouterr().out


def test_deploy_is_for_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--models", "slab_*", "--deploy"]) == 2
    assert "--deploy is for one model" in capsys.readouterr().err


def test_the_roofline_stands_beside_the_speeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slabformer.measure.roofline.LARGE", {"cpu": (256, 2**22)})
    found = bench(tmp_path / "out", str(saved(tmp_path / "model.safetensors")), "--roofline")
    assert all(row["of_floor"] > 0 for row in found["measurements"])
    assert "a large matrix product reaches" in " ".join(capsys.readouterr().out.split())
