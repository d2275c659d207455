"""Norms that are left in a file are counted, as operators and in pieces; what only looks like one is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slabformer.export.model import export
from slabformer.export.norms_left import DECOMPOSED, Operator, norms_in, norms_in_words, openvino_operators

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class ByHand(nn.Module):
    """A LayerNorm over channels of maps, as ConvNeXt's own is written."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class Rms(nn.Module):
    """RMSNorm with the reciprocal root."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class UnitLength(nn.Module):
    """Vectors of length 1, as queries and keys of XCiT are."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class Pooled(nn.Module):
    """A mean, a root of something else, and a weight's own norm: nothing of it normalises activations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.square().mean(1, keepdim=True).sqrt()
        return nn.functional.linear(x.abs().sqrt().mean((2, 3)), weight)


CASES = {
    "by hand": (ByHand(), {DECOMPOSED}),
    "rms": (Rms(), {DECOMPOSED}),
    "length": (UnitLength(), {DECOMPOSED}),
    "layer norm": (nn.LayerNorm(8), {"LayerNormalization"}),
    "group norm": (nn.GroupNorm(1, 3), {"GroupNormalization", "InstanceNormalization"}),
    "instance norm": (nn.InstanceNorm2d(3), {"InstanceNormalization"}),
    "none": (Pooled(), set()),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_norms_are_counted_in_onnx_and_in_openvino(case: tuple[nn.Module, set[str]], tmp_path: Path) -> None:
    model, kinds = case
    result = export(model.eval(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", batch_sizes=(1,))
    assert bool(result.norms) == bool(kinds)
    assert set(result.norms) <= kinds
    assert sum(result.norms.values()) <= 1
    openvino = pytest.importorskip("openvino")
    graph = openvino.Core().read_model(tmp_path / "model.onnx")
    assert bool(norms_in(openvino_operators(graph))) == bool(kinds)


def test_a_root_of_a_mean_counts_through_an_epsilon_and_a_dtype() -> None:
    chain = [Operator("ReduceMean"), Operator("Add", (0,)), Operator("Cast", (1,)), Operator("Pow", (2,))]
    assert norms_in(chain) == {DECOMPOSED: 1}
    assert norms_in([Operator("ReduceMean"), Operator("Softmax", (0,)), Operator("Sqrt", (1,))]) == {}
    assert norms_in_words({}) == "no norm left"
    assert norms_in_words({DECOMPOSED: 2}) == "2 decomposed norm left"
