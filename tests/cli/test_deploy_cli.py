"""`slab deploy`: one command from a saved model to a folder that runs without this library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import slabformer as sf
from saved_digits import save_digits_model
from slabformer.cli.main import main
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
