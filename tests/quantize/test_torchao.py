"""Fused models through torchao, ``quantize_`` on their Linears and PT2E on their graphs, are near what they were."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import language_models
import slabformer as sf
import small_models
import small_pvts
from fusing import ready

quantization = pytest.importorskip("torchao.quantization", reason="torchao is an extra")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torchao"
)
#: of the outputs' deviation
NEAR = 0.05


def deit() -> tuple[nn.Module, Tensor]:
    return small_models.trained_looking(), small_models.images(4)


def swin() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 5}
    return ready(timm.create_model("slab_swin_tiny", **sizes)).float(), small_pvts.images().float()


def pvt() -> tuple[nn.Module, Tensor]:
    return small_pvts.small("slab_pvt_tiny").float(), small_pvts.images().float()


def language_model() -> tuple[nn.Module, Tensor]:
    return Logits(language_models.trained_looking()).eval(), language_models.tokens()


class Logits(nn.Module):
    """The logits of a language model alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


KINDS = [deit, swin, pvt, language_model]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def fused(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    model, inputs = request.param()
    folded, report = sf.fuse(model, inputs)
    assert report.num_folded > 0
    return folded.requires_grad_(False), inputs


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, relative to the deviation of ``other``."""
    return float((one - other).square().mean().sqrt() / other.std())


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@torch.no_grad()
def test_linears_of_a_fused_model_are_quantised(fused: tuple[nn.Module, Tensor], name: str) -> None:
    model, inputs = fused
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, getattr(quantization, name)())
    linears = [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    assert linears
    assert all("Int8" in type(linear.weight).__name__ for linear in linears)
    assert 1e-4 < distance(quantised(inputs), model(inputs)) < NEAR


@pytest.mark.slow
@torch.no_grad()
def test_the_graph_of_a_fused_model_is_quantised(fused: tuple[nn.Module, Tensor]) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, inputs = fused
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (inputs,), strict=False).module(), quantizer)
    prepared(inputs)
    quantised = convert_pt2e(prepared)
    rounded = [node for node in quantised.graph.nodes if "dequantize_per_channel" in str(node.target)]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(rounded) >= len(linears)
    assert 1e-4 < distance(quantised(inputs), model(inputs)) < NEAR
