"""Fused models leave Python as unfused ones do: TorchScript, tracing, torch.export and ONNX, without our help."""

from __future__ import annotations

import copy
import functools
import io
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from fusing import FUSED, norm, ready, tokens
from slabformer.models.llama import SlabLlamaConfig, SlabLlamaForCausalLM
from slabformer.nn import Affine
from slabformer.nn.shifted_windows import ShiftedWindowAttention
from slabformer.surgery.fuse import fuse
from slabformer.tasks.language.fusing import LogitsOf
from tolerances import FLOAT32, assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported", "ignore::torch.jit.TracerWarning"
)
scripts = pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript does not support Python 3.14")

_DEIT = {"img_size": 16, "depth": 2, "embed_dim": 16, "num_heads": 2}
# with windows of 3 tokens the last map is one window, whose heads an attention may return in any strides
_SWIN = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 3}
_PVT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 2, 2)}
_CSWIN = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deit_prepbn": ("deit_micro_prepbn", _DEIT),
    "slab_deit": ("slab_deit_micro", _DEIT),
    "swin": ("slab_swin_tiny", {**_SWIN, "attention": "SSSS"}),
    "slab_swin": ("slab_swin_tiny", {**_SWIN, "attention": "LLSS"}),
    "pvt": ("pvt_tiny_prepbn", {**_PVT, "img_size": 64}),
    "slab_pvt": ("slab_pvt_tiny", {**_PVT, "img_size": 64, "attention": "LLSS", "linear_sr_ratios": (4, 2, 1, 1)}),
    "slab_pvt_v2": ("slab_pvt_v2_b0", {**_PVT, "img_size": 64}),
    "cswin": ("slab_cswin_tiny", {**_CSWIN, "attention": "SSSS"}),
    "slab_cswin": ("slab_cswin_tiny", {**_CSWIN, "attention": "LLSS"}),
}
#: those with softmax alone are slow: the others have softmax in their last two stages, shifted windows among them
each_family = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("swin", "pvt", "cswin") else name for name in FAMILIES],
)
BATCH = ({0: torch.export.Dim("batch", min=1)},)


@functools.cache
def fused_family(family: str) -> tuple[nn.Module, Tensor]:
    """A fused model in float64, and a batch of 5 images; it was traced on 2."""
    name, kwargs = FAMILIES[family]
    torch.manual_seed(0)
    model = ready(timm.create_model(name, num_classes=5, **kwargs))
    images = tokens(5, 3, kwargs["img_size"], kwargs["img_size"])
    result, report = fuse(model, images[:2])
    assert report.num_folded
    return result, images


def assert_same(actual: Tensor, model: nn.Module, images: Tensor, tolerance: float = FUSED) -> None:
    with torch.no_grad():
        assert_close(actual, model(images), tolerance)


@scripts
@each_family
def test_a_fused_model_scripts(family: str) -> None:
    """Saved and loaded again, for any batch size, and for images of any size where the family takes them."""
    model, images = fused_family(family)
    others = [] if "deit" in family else [tokens(3, 3, 96, 50)]
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    with torch.no_grad(), torch.jit.optimized_execution(False):
        for x in (images, *others):
            assert_same(scripted(x), model, x)


@each_family
def test_a_fused_model_is_traced_for_any_batch_size(family: str) -> None:
    model, images = fused_family(family)
    with torch.no_grad():
        assert_same(torch.jit.trace(model, images[:2], check_trace=False)(images), model, images)


@each_family
def test_a_fused_model_is_exported_for_any_batch_size(family: str) -> None:
    model, images = fused_family(family)
    assert_same(torch.export.export(model, (images[:2],), dynamic_shapes=BATCH).module()(images), model, images)


def onnx(model: nn.Module, images: Tensor, path: Path, shapes: Any = None) -> Tensor:
    """What onnxruntime makes of ``images``, from a file that torch alone wrote."""
    torch.onnx.export(model, (images[:2],), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_computes_what_shifted_windows_do_where_one_window_is_the_map(tmp_path: Path) -> None:
    model = ShiftedWindowAttention(16, 4, (2, 2), grid_size=(2, 2)).eval()
    x = tokens(2, 4, 16).float()
    assert_same(onnx(model, x, tmp_path / "model.onnx"), model, x, FLOAT32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each_family
def test_onnxruntime_computes_what_a_fused_model_does(family: str, tmp_path: Path) -> None:
    model, images = fused_family(family)
    single, images = copied_to_float32(model), images.float()
    assert_same(onnx(single, images[:2], tmp_path / "model.onnx"), single, images[:2], FLOAT32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each_family
def test_onnxruntime_takes_any_batch_size(family: str, tmp_path: Path) -> None:
    model, images = fused_family(family)
    single, images = copied_to_float32(model), images.float()
    assert_same(onnx(single, images, tmp_path / "model.onnx", BATCH), single, images, FLOAT32)


def copied_to_float32(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()


def test_a_fused_language_model_is_traced_and_exported_for_any_batch_size() -> None:
    config = SlabLlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    ids = torch.arange(30).view(5, 6)
    result, report = fuse(ready(SlabLlamaForCausalLM(config)), (), {"input_ids": ids[:2], "use_cache": False})
    assert report.num_folded
    model = LogitsOf(result).eval()
    with torch.no_grad():
        assert_same(torch.jit.trace(model, ids[:2], check_trace=False)(ids), model, ids)
    assert_same(torch.export.export(model, (ids[:2],), dynamic_shapes=BATCH).module()(ids), model, ids)


class Scriptable(nn.Module):
    """Norms of every kind that a fold leaves behind: gone with a new bias, kept, with an activation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.act = timm.layers.BatchNormAct2d(6)
        self.up, self.after = nn.ConvTranspose2d(6, 6, 2, 2, bias=False), nn.BatchNorm2d(6)
        self.kept, self.head = norm(), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.tanh(self.after(self.up(self.act(x))))
        x = x.flatten(2).transpose(1, 2)
        return self.head(self.kept(x)) + self.kept(x).sum(-1, keepdim=True)


@scripts
def test_a_scriptable_model_scripts_once_it_is_fused() -> None:
    model, images = ready(Scriptable()), tokens(2, 3, 8, 8)
    torch.jit.script(model)
    result, report = fuse(model, images)
    assert {outcome.name: outcome.action for outcome in report}["kept"] == "kept"
    assert isinstance(result.kept, Affine)
    with torch.no_grad(), torch.jit.optimized_execution(False):
        assert_same(torch.jit.script(result)(images), model, images)


@scripts
def test_a_model_of_one_size_says_why_it_cannot_be_scripted() -> None:
    result, _ = fuse(ready(nn.Sequential(norm(), nn.Linear(6, 3))), tokens(2, 4, 6), fixed_size=True)
    with pytest.raises(AttributeError, match=r"fixed_size=True checks sizes in Python; use torch\.jit\.trace"):
        torch.jit.script(result)
    with torch.no_grad():
        assert_same(torch.jit.trace(result, tokens(2, 4, 6))(tokens(3, 4, 6)), result, tokens(3, 4, 6))
