"""What a fuse leaves behind in the process: nothing."""

from __future__ import annotations

import gc
import linecache
import tracemalloc

import pytest
import torch
from fuse_memory import PeakMemory
from torch import nn
from torch.fx import graph_module

from fusing import X, net, norm, ready
from slabformer.nn import RepBN
from slabformer.ops import precision
from slabformer.surgery.fuse import fuse, fuse_
from slabformer.surgery.fuse.tree import values


def model() -> nn.Module:
    return net(lambda m, x: m.b(torch.tanh(m.a(m.norm(x)))), norm=norm(), a=nn.Linear(6, 6), b=nn.Linear(6, 3))


def test_no_source_of_a_graph_stays_in_torch_fx_or_linecache() -> None:
    fuse(model(), X)  # what torch imports and notes once
    before = set(linecache.cache), set(graph_module._loader.eval_cache)
    for _ in range(3):
        fuse(model(), X)
    assert (set(linecache.cache), set(graph_module._loader.eval_cache)) == before


def test_sources_of_the_callers_graphs_stay() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    source = type(graph).forward.__code__.co_filename
    fuse(model(), X)
    assert linecache.getline(source, 4)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_calls() -> None:
    model_ = model()

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    for _ in range(5):
        fuse(model_, X)
    before = objects()
    tracemalloc.start()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    for _ in range(30):
        fuse(model_, X)
    assert objects() - before < 500
    grown = tracemalloc.get_traced_memory()[0] - held
    tracemalloc.stop()
    assert grown < 30 * 16384  # sources of graphs alone were 0.16 MB a call


def deep(width: int, depth: int) -> nn.Module:
    """Blocks that read one norm by two layers, the second of which has no bias."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for block in m.blocks:  # type: ignore[union-attr]
            y = block[0](x)
            x = x + torch.tanh(block[1](y)) + torch.tanh(block[2](y))
        return x

    def block() -> nn.Module:
        return nn.ModuleList([RepBN(width), nn.Linear(width, width), nn.Linear(width, width, bias=False)])

    return net(forward, blocks=nn.ModuleList(block() for _ in range(depth)))


def test_weights_that_are_widened_on_use_fold_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model_, x = ready(deep(6, 3), torch.float32), X.float()
    expected, known = fuse(model_, x)
    for module in (precision, values):
        monkeypatch.setattr(module, "WIDE_ON_USE_FROM", 1)
    fused, report = fuse(model_, x)
    assert report.num_folded == 3
    assert list(report) == list(known)
    for name, tensor in fused.state_dict().items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, expected.state_dict()[name])


def test_a_fold_that_changes_the_output_is_refused_of_weights_that_are_widened_on_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.weight.abs().max()  # which folding changes

    monkeypatch.setattr(precision, "WIDE_ON_USE_FROM", 1)
    model_ = ready(net(lambda m, x: m.layer(m.norm(x)), norm=norm(), layer=Scaled(6, 3)), torch.float32)
    assert fuse(model_, X.float())[1].num_kept == 1


@pytest.mark.slow
def test_fusing_in_place_takes_no_second_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slabformer.surgery.fuse.LARGE", 0)
    model_ = ready(deep(512, 40), torch.float32).bfloat16()
    x = torch.randn(2, 3, 512).bfloat16()
    fuse(ready(deep(6, 1), torch.float32), X.float())  # what is imported once
    weights = sum(parameter.nbytes for parameter in model_.parameters())
    with PeakMemory() as peak:
        assert fuse_(model_, x).num_folded == 40
    layer = 2 * 8 * 512 * 512
    assert peak.bytes < 0.2 * weights + 6 * layer
