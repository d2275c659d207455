"""`slab quantize`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes_of import RECIPES
from saved_digits import save_digits_model
from slabformer.cli.main import main


@pytest.mark.slow
def test_a_model_is_folded_quantised_compared_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = save_digits_model(tmp_path / "model.safetensors"), tmp_path / "int8.xml"
    command = ["quantize", str(model), "--data", "digits", "--output", str(output), "--seconds", "0.1"]
    assert main([*command, "--calibrate", "100", "--threads", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("in integers", "float32", "int8", "top-1 class alike on", "x as fast"):
        assert text in printed
    assert output.is_file()
    assert output.with_suffix(".bin").is_file()


@pytest.mark.slow
def test_integers_of_a_trained_model_call_99_of_100_digits_as_its_floats_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(RECIPES / "digits.yaml"), "--output", str(tmp_path / "run")]) == 0
    command = ["quantize", str(tmp_path / "run" / "model.safetensors"), "--data", "digits", "--threads", "1"]
    assert main([*command, "--output", str(tmp_path / "int8.xml"), "--seconds", "0.1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = re.search(r"top-1 class alike on ([\d.]+)%", printed)
    assert found is not None
    assert float(found[1]) >= 99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "model.onnx"], "--output must be a .xml file, got 'model.onnx'"),
        (["--output", "m.xml", "--calibrate", "0"], "at least 1"),
    ],
    ids=["suffix", "calibrate"],
)
def test_mistakes_are_told_before_the_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_digits_model(tmp_path / "model.safetensors")
    assert main(["quantize", str(model), "--data", "digits", *options]) == 2
    assert message in capsys.readouterr().err
