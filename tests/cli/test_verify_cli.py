"""`slab verify`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from slabformer.cli.main import main
from small_models import saved


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(saved(tmp_path / "model.safetensors"))


def test_a_model_equals_itself(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", model, model, "--batch-size", "3"]) == 0
    assert "100.0% of 3 random images" in capsys.readouterr().out


def test_models_that_differ_exit_with_1(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = saved(tmp_path / "other.safetensors", seed=1)
    assert main(["verify", model, str(other)]) == 1
    printed = capsys.readouterr().err
    assert "outputs differ by" in printed
    assert "top-1 agreement" in printed
    assert printed.count("\n") == 1


def test_given_images_are_read_from_files_and_folders(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    for index, path in enumerate(["folder/a.png", "folder/b.png", "c.png"]):
        Image.fromarray(torch.full((20, 30, 3), 80 * index, dtype=torch.uint8).numpy()).save(tmp_path / path)
    assert main(["verify", model, model, "--images", str(tmp_path / "folder"), str(tmp_path / "c.png")]) == 0
    assert "of 3 images" in capsys.readouterr().out


def test_missing_files_are_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", model, "missing.safetensors"]) == 2
    assert main(["verify", model, model, "--images", "missing.png"]) == 2
    model_line, image_line = capsys.readouterr().err.splitlines()
    assert "missing.safetensors" in model_line
    assert "missing.png" in image_line
