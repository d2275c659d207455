"""Compiled training: a graph for each phase, and what eager training computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from fading import MASKS, C, Net, aligned_gradients, assert_all_close, train
from slabformer import ProgressiveSchedule, token_mask
from slabformer.nn.controls import prepbn_modules
from tolerances import FLOAT32, assert_close


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("stagger", [0.0, 0.5], ids=["together", "staggered"])
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no_mask", "mask"])
def test_compiles_once_a_phase(masked: bool, stagger: float) -> None:
    model, counter = Net(), CompileCounter()
    schedule = ProgressiveSchedule(model, 9, warmup=1 / 3, fade=1 / 3, stagger=stagger)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for step in range(9):
        mask = torch.rand(2, 5) > 0.2 if masked else None
        with token_mask(model, mask):
            compiled(1 + torch.randn(2, 5, C, dtype=torch.float64)).mean().backward()
        schedule.step()
        frames.append(counter.frame_count)
        assert model.blocks[0][0].rep.num_batches_tracked == step + 1
    assert frames == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_alignment_in_compiled_training_is_that_of_eager() -> None:
    compiled = Net()
    compiled.compile(backend="aot_eager", fullgraph=True)
    (term, gradients), (expected_term, expected) = (aligned_gradients(model) for model in (compiled, Net()))
    assert_close(term, expected_term, FLOAT32)
    assert_all_close(gradients, expected, FLOAT32)


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpoint_inside"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TF32.*:UserWarning")  # of torch's own compiler
def test_compiled_training_equals_eager(backend: str, reentrant: bool | None) -> None:
    model = Net(reentrant, dtype=torch.float32)
    expected = train(Net(dtype=torch.float32), steps=3, mask=MASKS["mask"])
    model.compile(backend=backend, fullgraph=True)
    assert_all_close(train(model, steps=3, mask=MASKS["mask"]), expected, FLOAT32)


@pytest.fixture
def _compiles_in_checkpoints() -> None:
    """Skip where a block without a norm of ours already fails, as with torch 2.11."""
    block = nn.Sequential(nn.Linear(C, C), nn.Tanh())
    block.compile(backend="eager", fullgraph=True)
    try:
        checkpoint(block, torch.randn(2, C, requires_grad=True), use_reentrant=False).sum().backward()
    except RuntimeError as error:
        pytest.skip(f"this torch compiles no block inside a checkpoint: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("_fresh_compiler", "_compiles_in_checkpoints")
@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False], ids=["reentrant", "not"])
@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TF32.*:UserWarning")
def test_compiled_blocks_inside_checkpoints_count_once(backend: str, reentrant: bool) -> None:
    expected = train(Net(dtype=torch.float32), steps=3)
    actual = train(Net(reentrant, compiled=backend, dtype=torch.float32), steps=3)
    assert_all_close(actual, expected, FLOAT32)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), INDUCTOR])
@pytest.mark.parametrize("reentrant", [None, pytest.param(False, marks=pytest.mark.slow)], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(("phase", "gamma"), [("warm", 1.0), ("done", 0.0)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TF32.*:UserWarning")
def test_compiled_steps_follow_gamma_or_refuse_it(
    backend: str, reentrant: bool | None, phase: str, gamma: float
) -> None:
    """Neither a write before compilation nor one after it is computed wrongly."""
    model, x = Net(reentrant, dtype=torch.float32), 1 + torch.randn(2, 5, C)
    norms = prepbn_modules(model).values()
    for norm in norms:
        norm.set_gamma(0.5)
        norm.gamma.fill_(gamma)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(compiled(x), copy.deepcopy(model)(x), FLOAT32)
    assert {norm.known_phase for norm in norms} == {phase}
    for norm in norms:
        norm.gamma.fill_(0.5)
    with pytest.raises(RuntimeError, match=r"gamma of a PRepBN was changed.*write it with set_gamma"):
        compiled(x)
    for norm in norms:
        norm.set_gamma(0.5)
    assert_close(compiled(x), copy.deepcopy(model)(x), FLOAT32)
