"""Files for other runtimes compute what PyTorch does, at any batch size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer.export import model as export_module
from slabformer.export.model import export
from slabformer.export.refusals import UnsupportedError
from slabformer.measure.equality import Runtime
from small_models import images, trained_looking
from tolerances import PATIENCE

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


class Pair(nn.Module):
    """Two inputs, of which one is masked away where the other is 0, and outputs in containers."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, object]:
        kept = tokens * mask[:, :, None]
        return {"tokens": kept.relu(), "sums": [kept.sum(1), mask.sum(1)]}


PAIR = {"tokens": torch.randn(3, 5, 4), "mask": torch.randint(0, 2, (3, 5))}


@pytest.mark.parametrize("example", [PAIR, tuple(PAIR.values())], ids=["by name", "by position"])
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_several_inputs_and_outputs_go_through_by_name_and_by_position(tmp_path: Path, example, format: str) -> None:
    result = export(Pair().eval(), example, tmp_path / "model", format=format)
    assert result.max_rel < 1e-5
    if format == "onnx":
        graph = onnx.load(tmp_path / "model").graph
        assert [each.name for each in graph.input] == ["tokens", "mask"]
        assert [each.name for each in graph.output] == ["tokens_out", "sums_0", "sums_1"]
        assert graph.input[1].type.tensor_type.elem_type == onnx.TensorProto.INT64
        assert [each.type.tensor_type.shape.dim[0].dim_param for each in graph.input] == ["batch", "batch"]


def test_versions_of_onnx_can_be_asked_for(tmp_path: Path) -> None:
    export(Scaled().eval(), torch.randn(1, 4), tmp_path / "model.onnx", opset=20, ir_version=9)
    written = onnx.load(tmp_path / "model.onnx")
    assert (written.ir_version, written.opset_import[0].version) == (9, 20)
    with pytest.raises(ValueError, match="opset and ir_version are ONNX's; leave them out for pt2"):
        export(Scaled().eval(), torch.randn(1, 4), tmp_path / "model.pt2", format="pt2", opset=20)
    with pytest.raises(ValueError, match="opset must be"):
        export(Scaled().eval(), torch.randn(1, 4), tmp_path / "model.onnx", opset=3)


def test_norms_that_are_left_in_a_file_are_counted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(4), Scaled(), nn.LayerNorm(2)).eval()
    assert export(model, torch.randn(2, 4), tmp_path / "model.onnx").norms == {"LayerNormalization": 2}
    assert export(Scaled().eval(), torch.randn(2, 4), tmp_path / "model.onnx").norms == {}


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Bessel(), r"ONNX does not take the operator \w+\.bessel_j0 \(test_export_model\.py, line \d+\): "),
        (Branching(), r"torch\.export does not take this model \(test_export_model\.py, line \d+\): GuardOnData"),
    ],
    ids=["operator", "branch"],
)
def test_what_cannot_be_exported_is_named_with_its_line(tmp_path: Path, model: nn.Module, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as refused:
        export(model.eval(), torch.randn(2, 3), tmp_path / "model.onnx")
    assert "\n" not in str(refused.value)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_file_that_computes_something_else_is_refused_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, signature: object, example: object, path: Path) -> Runtime:
        path.write_text("wrong")
        return Runtime(lambda x: model(x) * 1.01)

    monkeypatch.setattr(export_module, "_export_pt2", wrong)
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(sf.VerificationError, match="outputs differ"):
        export(Scaled().eval(), torch.randn(1, 4), tmp_path / "model.pt2", format="pt2")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.pt2", "before")]


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
def test_a_full_disk_does_not_end_the_process(tmp_path: Path) -> None:
    script = f"""
import resource, signal, torch
from slabformer.export.model import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Linear(16, 64).eval()
resource.setrlimit(resource.RLIMIT_FSIZE, (4200, 4200))
try:
    export(model, torch.randn(1, 16), {str(tmp_path / "model.pt2")!r}, format="pt2")
except OSError as error:
    print(error.filename)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'model.pt2'}\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_train_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval mode"):
        export(Scaled(), torch.randn(1, 4), tmp_path / "model.onnx")


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be 'onnx' or 'pt2', got 'tflite'"):
        export(Scaled().eval(), torch.randn(1, 4), tmp_path / "model", format="tflite")
