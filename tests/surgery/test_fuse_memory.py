"""What a fuse leaves behind in the process: nothing."""

from __future__ import annotations

import gc
import linecache
import tracemalloc

import pytest
import torch
from torch import nn
from torch.fx import graph_module

from fusing import X, net, norm
from slabformer.surgery.fuse import fuse


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
