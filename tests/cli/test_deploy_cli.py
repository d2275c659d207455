"""`slab deploy`: one command from a saved model to a folder that runs without this library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import slabformer as sf
from detectors import saved as saved_detector
from language_models import talkative
from saved_digits import save_digits_model
from slabformer.cli.main import main
from slabformer.tasks.language.folders import save_model_folder
from slabformer.tasks.saved_model import load_model
from small_models import saved

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@torch.no_grad()
def test_a_model_becomes_a_folder_with_all_that_it_takes_to_use_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = saved(tmp_path / "model.safetensors"), tmp_path / "deployed"
    command = ["deploy", str(model), "--target", "onnxruntime", "--output", str(output), "--threads", "1"]
    assert main([*command, "--seconds", "0.1"]) == 0
    printed = capsys.readouterr().out
    for text in ("as given", "9 of 9 norms folded", "no norm left", "taken: onnxruntime", "1 thread of"):
        assert text in printed
    loaded, (original, info) = sf.load_deployed(output), load_model(model)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(loaded(x), original(x), rtol=1e-4, atol=1e-4)
    assert loaded.manifest.class_names == list("abcde")
    assert loaded.manifest.preprocessing["height"] == 16
    assert loaded.manifest.preprocessing["mean"] == list(info.mean)
    assert (output / "latency.png").stat().st_size > 5000
    assert main(command) == 2
    assert "is not empty; give another folder" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--seconds", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["taken"] == "onnxruntime"
    assert told["files"] == [str(output)]


@pytest.mark.slow
def test_integers_are_calibrated_on_data_and_held_against_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = save_digits_model(tmp_path / "model.safetensors"), tmp_path / "deployed"
    command = ["deploy", str(model), "--data", "digits", "--dtype", "int8", "--calibrate", "50", "--json"]
    assert main([*command, "--output", str(output), "--seconds", "0.1", "--threads", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {step["name"] for step in told["steps"]} >= {"onnxruntime", "openvino"}
    assert told["same_top1"] > 0.9
    assert set(told["accuracy"]) == {"model", "deployed"}
    assert sf.load_deployed(output).manifest.dtype == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "int8 needs images that show the ranges of activations; give --data"),
        (["--target", "torch", "--dtype", "int8", "--data", "digits"], "torch has no int8 here; it has float32"),
        (["--target", "onnx"], "onnxruntime"),
        (["--images", "0"], "at least 1"),
    ],
    ids=["calibration", "dtype", "target", "images"],
)
def test_mistakes_are_told_before_the_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "model.safetensors")
    assert main(["deploy", str(model), "--output", str(tmp_path / "deployed"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "deployed").exists()


@pytest.mark.slow
def test_a_language_model_is_compared_with_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_folder(talkative(), None, tmp_path / "model")
    command = ["deploy", str(tmp_path / "model"), "--target", "onnxruntime", "--context", "60", "--seconds", "0"]
    assert main([*command, "--images", "2", "--output", str(tmp_path / "deployed"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens_alike"] == told["tokens"] == 64
    manifest = sf.load_deployed(tmp_path / "deployed").manifest
    assert (manifest.kind, manifest.preprocessing["context"]) == ("decoder", 60)


@pytest.mark.slow
def test_a_detector_is_compared_on_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_detector(tmp_path / "detector.safetensors")
    command = ["deploy", str(model), "--target", "openvino", "--size", "64", "90", "--seconds", "0", "--json"]
    assert main([*command, "--output", str(tmp_path / "deployed")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 4
    assert told["max_pixels"] < 0.05
    manifest = sf.load_deployed(tmp_path / "deployed").manifest
    assert (manifest.kind, manifest.class_names) == ("detector", ["cat", "dog", "emu"])
    assert (manifest.preprocessing["height"], manifest.preprocessing["width"]) == (64, 96)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classifier", ["--context", "8"], "a classifier has no --context; leave it out"),
        ("classifier", ["--size", "64", "64"], "a classifier has no --size; leave it out"),
        ("detector", ["--images", "2"], "a detector takes one image at a time, got --images 2"),
        ("detector", ["--target", "torch", "--seconds", "0"], "torch takes no such model; use onnxruntime or openvino"),
        ("writer", ["--data", "digits"], "a language model has no --data; leave it out"),
        ("writer", ["--context", "65"], "context must be at most 64, the model's longest text, got 65"),
        ("writer", ["--dtype", "int8", "--target", "onnxruntime"], "int8 is for classifiers; deploy a language model"),
    ],
    ids=["context", "size", "images", "target", "data", "longest", "int8"],
)
def test_options_of_other_kinds_are_refused(
    kind: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "writer":
        save_model_folder(talkative(num_hidden_layers=1), None, tmp_path / kind)
    else:
        kind = f"{kind}.safetensors"
        (saved_detector if kind.startswith("detector") else saved)(tmp_path / kind)
    capsys.readouterr()
    assert main(["deploy", str(tmp_path / kind), "--output", str(tmp_path / "deployed"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "deployed").exists()
