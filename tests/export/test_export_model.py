"""Files for other runtimes compute what PyTorch does, at any batch size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer.export import model as export_module
from slabformer.export.model import export
from small_models import images, trained_looking

# torch.onnx's own code warns about its own internals
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slab_deit_micro", "deit_micro_prepbn"])
def test_onnx_equals_pytorch_at_any_batch_size(tmp_path: Path, name: str) -> None:
    import onnxruntime

    model = trained_looking(name)
    fused, _ = sf.fuse(model, images())
    result = export(fused, images(1), tmp_path / "model.onnx", metadata={"slabformer": "{}"})
    assert result.batch_sizes == (1, 2, 7)
    assert 0 < result.max_rel < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["slabformer"] == "{}"
    (logits,) = session.run(None, {"images": images(5, seed=3).numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), model(images(5, seed=3)), atol=1e-4)


@pytest.mark.slow
def test_pt2_equals_pytorch_at_any_batch_size(tmp_path: Path) -> None:
    model = trained_looking()
    export(model, images(1), tmp_path / "model.pt2", format="pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert torch.allclose(loaded(images(5)), model(images(5)), atol=1e-5)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_file_that_computes_something_else_is_refused_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, example: torch.Tensor, path: Path, shapes: object) -> Callable[..., torch.Tensor]:
        path.write_text("wrong")
        return lambda x: model(x) * 1.01

    monkeypatch.setattr(export_module, "_export_pt2", wrong)
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(sf.VerificationError, match="outputs differ"):
        export(Scaled().eval(), torch.randn(1, 4), tmp_path / "model.pt2", format="pt2")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.pt2", "before")]


def test_train_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval mode"):
        export(Scaled(), torch.randn(1, 4), tmp_path / "model.onnx")


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of onnx, pt2, got 'tflite'"):
        export(Scaled().eval(), torch.randn(1, 4), tmp_path / "model", format="tflite")
