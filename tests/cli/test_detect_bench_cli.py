"""`slab detect bench` and `slab detect export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detectors import saved
from slabformer.cli.detect import bench
from slabformer.cli.main import main
from slabformer.export.detector import OnnxDetector
from slabformer.tasks.detection.saved import DetectorInfo


def test_a_linear_attention_backbone_has_a_softmax_baseline_and_one_that_differs_in_norms_alone():
    config = bench.parser().parse_args(["slab_swin_tiny", "--output-norm", "prepbn", "--sampling-ratio", "2"])
    variants = bench._variants(bench._info(config))
    assert list(variants) == ["LayerNorm, softmax", "LayerNorm", "PRepBN"]
    assert variants["PRepBN"].backbone_args == {"output_norm": "prepbn"}
    assert variants["LayerNorm"].backbone_args == {"norm": "layernorm", "output_norm": "layernorm"}
    assert variants["LayerNorm, softmax"].backbone_args["attention"] == "SSSS"
    assert {variant.detector.roi_sampling_ratio for variant in variants.values()} == {2}
    softmax = bench._info(bench.parser().parse_args(["swin_tiny_prepbn"]))
    assert list(bench._variants(softmax)) == ["LayerNorm", "PRepBN"]


@pytest.mark.slow
def test_a_saved_detectors_sizes_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model.safetensors")
    options = [
        "--size",
        "64",
        "80",
        "--threads",
        "1",
        "--no-compile",
        "--seconds",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["detect", "bench", str(model), *options]) == 0
    assert "latency of slab_swin_tiny at 64x80" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert len(report["rows"]) == 2 * 4
    assert report["agreement"]["max_pixels"] < 1e-3


@pytest.mark.slow
def test_a_saved_detector_is_exported_with_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = saved(tmp_path / "model.safetensors"), tmp_path / "detector.onnx"
    assert main(["detect", "export", str(model), "--output", str(output), "--num-images", "2"]) == 0
    assert "detections on 2 images agree with PyTorch" in capsys.readouterr().out
    exported = OnnxDetector(output)
    assert exported.size == (64, 96)
    assert DetectorInfo.from_json(exported.metadata[DetectorInfo.KEY]).class_names == ["cat", "dog", "emu"]


def test_another_format_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = tmp_path / "model.safetensors", tmp_path / "detector.pt2"
    model.touch()
    assert main(["detect", "export", str(model), "--output", str(output)]) == 2
    assert "--output must be a .onnx file" in capsys.readouterr().err
