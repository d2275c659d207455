"""`slab detect fuse`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detectors import pictures, saved, small_detector, without_folding
from slabformer.cli.main import main
from slabformer.nn import Affine, PRepBN
from slabformer.tasks.detection.saved import load_detector


@pytest.mark.slow
def test_a_saved_detector_is_fused_compared_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model.safetensors", output_norm="prepbn")
    output, report = tmp_path / "fused.safetensors", tmp_path / "report.json"
    arguments = ["detect", "fuse", str(model), "--output", str(output), "--json", str(report)]
    assert main([*arguments, "--data", "digits", "--num-images", "3"]) == 0
    printed = capsys.readouterr().out
    assert "18 of 18 norms folded" in printed
    assert "on 3 images agree" in printed
    assert "LayerNorms stay" not in printed
    found = json.loads(report.read_text())
    assert found["num_kept"] == 0
    assert found["agreement"]["max_pixels"] < 1e-3
    (unfused, _), (fused, info) = load_detector(model), load_detector(output)
    assert info.fused
    assert info.category_ids == [3, 5, 8]
    assert not any(isinstance(module, PRepBN) for module in fused.modules())
    with torch.no_grad():
        (before,), (after,) = (detector(pictures((97, 130))) for detector in (unfused, fused))
    assert len(before["labels"]) > 0
    assert torch.equal(before["labels"], after["labels"])
    assert torch.allclose(before["boxes"], after["boxes"], atol=1e-2)
    assert main(["detect", "fuse", str(output), "--output", str(tmp_path / "again.safetensors")]) == 2
    assert "is fused already" in capsys.readouterr().err


def test_layernorms_that_stay_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slabformer.deployment.detector.fuse_detector", without_folding)
    model = saved(tmp_path / "model.safetensors")
    assert (
        main(["detect", "fuse", str(model), "--output", str(tmp_path / "fused.safetensors"), "--num-images", "1"]) == 0
    )
    assert "4 LayerNorms stay; trained with --model.output-norm prepbn" in capsys.readouterr().out


def test_a_detector_whose_norms_still_fade_is_refused_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "model.safetensors", small_detector().eval())
    assert main(["detect", "fuse", str(model), "--output", str(tmp_path / "fused.safetensors")]) == 2
    assert "gamma" in capsys.readouterr().err
    assert not (tmp_path / "fused.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--num-images", "0"], "at least 1"), (["--data", "nowhere"], "nowhere")],
    ids=["no_images", "no_data"],
)
def test_pictures_that_are_not_there_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    model = saved(tmp_path / "model.safetensors")
    assert main(["detect", "fuse", str(model), "--output", str(tmp_path / "fused.safetensors"), *options]) == 2
    assert message in capsys.readouterr().err


def test_modules_of_the_backbone_that_are_named_keep_their_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = saved(tmp_path / "model.safetensors"), tmp_path / "fused.safetensors"
    norm = "body.body.stages.0.blocks.0.norm1"
    assert main(["detect", "fuse", str(model), "--output", str(output), "--num-images", "1", "--keep", f"{norm}*"]) == 0
    kept = [name for name, module in load_detector(output)[0].backbone.named_modules() if isinstance(module, Affine)]
    assert kept == [norm]
    assert main(["detect", "fuse", str(model), "--output", str(output), "--keep", "stage"]) == 2
    assert "keep='stage' matches no module" in capsys.readouterr().err
