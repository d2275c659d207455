"""`slab fuse`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import slabformer as sf
from slabformer.cli.main import main
from slabformer.nn.affine import Folded
from slabformer.surgery.fuse import fuse
from slabformer.tasks.saved_model import load_model
from small_models import images, saved


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "model.safetensors")


def test_a_saved_model_is_fused_verified_and_saved(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report = tmp_path / "fused.safetensors", tmp_path / "report.json"
    assert main(["fuse", str(model), "--output", str(output), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "9 of 9 norms folded" in printed
    assert "blocks.3.norm2" in printed
    found = json.loads(report.read_text())
    assert (found["num_folded"], found["num_kept"]) == (9, 0)
    assert 0 <= found["verify"]["max_rel"] <= 1e-5
    (unfused, info), (fused, fused_info) = load_model(model), load_model(output)
    assert fused_info.fused
    assert fused_info.class_names == info.class_names == list("abcde")
    assert sum(isinstance(module, Folded) for module in fused.modules()) == 9
    with torch.no_grad():
        assert torch.allclose(fused(images()), unfused(images()), atol=1e-4)


def test_norms_and_methods_that_are_named_stay(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "fused.safetensors", tmp_path / "report.json"
    files = ["--output", str(output), "--json", str(report)]
    assert main(["fuse", str(model), *files]) == 0
    assert "computed otherwise now: forward_features" in " ".join(capsys.readouterr().out.split())
    assert "forward_features" in json.loads(report.read_text())["changed_methods"]
    assert main(["fuse", str(model), *files, "--keep", "blocks.0.norm?", "--outputs", "forward_features"]) == 0
    found = json.loads(report.read_text())
    kept = {row["name"]: row["codes"] for row in found["norms"] if row["action"] == "kept"}
    assert kept["blocks.0.norm1"] == kept["blocks.0.norm2"] == ["keep"]
    assert kept["norm"][0] == "kept-output"
    assert "[keep]" in "".join(capsys.readouterr().out.split())
    assert found["changed_methods"] == []
    with torch.no_grad():
        unfused, fused = load_model(model)[0], load_model(output)[0]
        assert torch.allclose(fused.forward_features(images()), unfused.forward_features(images()), atol=1e-4)


def test_a_model_whose_norms_still_fade_is_refused_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fused.safetensors"
    assert main(["fuse", "slab_deit_micro", "--output", str(output)]) == 2
    printed = capsys.readouterr().err
    assert "gamma" in printed
    assert printed.count("\n") == 1
    assert not output.exists()


def test_a_fused_model_that_differs_is_not_saved(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object, **options: object) -> tuple[nn.Module, sf.FuseReport]:
        fused, report = fuse(*args, **options)
        with torch.no_grad():
            fused.head.bias += 0.1
        return fused, report

    monkeypatch.setattr(sf, "fuse", wrong)
    assert main(["fuse", str(model), "--output", str(tmp_path / "fused.safetensors")]) == 1
    assert "outputs differ" in capsys.readouterr().err
    assert not (tmp_path / "fused.safetensors").exists()


def test_layers_are_untied_where_asked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spied(*args: object, **options: object) -> tuple[nn.Module, sf.FuseReport]:
        asked.append(options["untie"])
        return fuse(*args, **options)

    monkeypatch.setattr(sf, "fuse", spied)
    for options in ([], ["--untie"]):
        assert main(["fuse", str(model), "--output", str(tmp_path / "fused.safetensors"), *options]) == 0
    assert asked == [False, True]


def test_a_missing_folder_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slabformer.cli.fuse.load", lambda config: pytest.fail("loaded a model first"))
    assert main(["fuse", "slab_deit_micro", "--output", str(tmp_path / "missing" / "fused.safetensors")]) == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["slab_deit_micr"], "did you mean 'slab_deit_micro'?"),
        (["missing.safetensors"], "missing.safetensors"),
        (["slab_deit_micro", "--checkpoint", "missing.pth"], "missing.pth"),
        (["slab_deit_micro", "--checkpoint", __file__, "--pretrained"], "exclude each other"),
        (["slab_deit_micro", "--input-sice", "32"], "did you mean '--input-size'?"),
        (["MODEL", "--keep", "block.0"], "keep='block.0' matches no module of"),
        (["MODEL", "--outputs", "features"], "outputs='features' is no method of"),
    ],
    ids=["unknown-model", "missing-file", "missing-checkpoint", "two-sources", "unknown-option", "keep", "outputs"],
)
def test_mistakes_are_one_line(
    arguments: list[str], complaint: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(model) if argument == "MODEL" else argument for argument in arguments]
    assert main(["fuse", *arguments, "--output", str(tmp_path / "fused.safetensors")]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert printed.count("\n") == 1


def test_weights_of_a_file_are_not_given_twice(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", str(model), "--pretrained", "--output", str(tmp_path / "fused.safetensors")]) == 2
    assert "holds its weights" in capsys.readouterr().err


def test_a_model_is_fused_for_another_input_size(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "fused.safetensors"
    assert main(["fuse", str(model), "--input-size", "32", "--output", str(output)]) == 0
    fused, info = load_model(output)
    assert info.input_size == (3, 32, 32)
    with torch.no_grad():
        assert fused(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.slow
def test_plain_weights_load_into_timms_own_model_without_norms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plain.safetensors"
    source = saved(tmp_path / "deit.safetensors", "deit_tiny_prepbn")
    assert main(["fuse", str(source), "--output", str(output), "--plain"]) == 0
    printed = capsys.readouterr().out
    expression = printed.rpartition("load it without slabformer: ")[2].splitlines()[0]
    stock = eval(expression, {"timm": timm, "torch": torch})
    stock.load_state_dict(load_file(output), strict=True)
    fused, _ = load_model(output)
    with torch.no_grad():
        assert torch.equal(stock.eval()(images()), fused(images()))


def test_weights_that_timm_has_no_place_for_are_refused_and_nothing_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plain.safetensors"
    assert main(["fuse", str(model), "--output", str(output), "--plain"]) == 2
    printed = capsys.readouterr().err
    assert "timm has no model of its own for slab_deit_micro" in printed
    assert not output.exists()
