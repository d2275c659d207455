"""`slab export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slabformer.cli.main import main
from small_models import saved

# torch.onnx's own code warns about its own internals
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(saved(tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_onnx_is_written_checked_and_describes_itself(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    output = tmp_path / "model.onnx"
    assert main(["export", model, "--output", str(output), "--batch-sizes", "1", "3"]) == 0
    assert "at batch sizes 1, 3" in capsys.readouterr().out
    header = onnxruntime.InferenceSession(output).get_modelmeta().custom_metadata_map
    assert json.loads(header["slabformer"])["class_names"] == list("abcde")
    assert [path.name for path in tmp_path.iterdir() if "onnx" in path.name] == ["model.onnx"]


@pytest.mark.slow
def test_pt2_is_written_and_checked(model: str, tmp_path: Path) -> None:
    assert main(["export", model, "--output", str(tmp_path / "model.pt2")]) == 0
    with torch.no_grad():
        assert torch.export.load(tmp_path / "model.pt2").module()(torch.randn(4, 3, 16, 16)).shape == (4, 5)


class Doubled(nn.Module):
    """Twice the outputs of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.model(images)


@pytest.mark.slow
def test_a_file_that_fails_its_check_does_not_appear(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())
    exported = torch.export.export

    def export_another(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return exported(Doubled(module).eval(), *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export_another)
    assert main(["export", model, "--output", str(tmp_path / "model.pt2")]) == 1
    assert "outputs differ" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_a_name_without_a_known_format_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", model, "--output", "model.tflite"]) == 2
    assert "name it .onnx or .pt2" in capsys.readouterr().err


def test_a_missing_folder_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slabformer.cli.export.load", lambda config: pytest.fail("loaded a model first"))
    assert main(["export", "slab_deit_micro", "--output", str(tmp_path / "missing" / "model.onnx")]) == 2
    printed = capsys.readouterr().err
    assert "missing" in printed
    assert printed.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slab_deit_micro", "convnext_atto"], ids=["tables", "any size"])
def test_height_and_width_may_differ(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    output = tmp_path / "model.onnx"
    command = ["export", name, "--input-size", "32", "64", "--output", str(output)]
    assert main([*command, "--batch-sizes", "1", "--json"]) == 0
    assert bool(json.loads(capsys.readouterr().out)["norms"]) == (name == "convnext_atto")
    session = onnxruntime.InferenceSession(output)
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 64]
    assert json.loads(session.get_modelmeta().custom_metadata_map["slabformer"])["input_size"] == [3, 32, 64]


def test_a_size_has_two_sides(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", model, "--output", str(tmp_path / "model.onnx"), "--input-size"]
    assert main([*command, "16", "16", "3"]) == 2
    assert "--input-size takes one number, or height and width; got 3 numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_saved_model_is_resized(model: str, tmp_path: Path) -> None:
    import onnxruntime

    output = tmp_path / "model.onnx"
    assert main(["export", model, "--input-size", "16", "32", "--batch-sizes", "2", "--output", str(output)]) == 0
    assert onnxruntime.InferenceSession(output).get_inputs()[0].shape == ["batch", 3, 16, 32]
