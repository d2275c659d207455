"""Training leaves the random numbers, the threads and accelerate's settings of its process as they were."""

from __future__ import annotations

import random

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from slabformer.tasks.engine.devices import create_accelerator
from slabformer.tasks.engine.process import leaves_the_process_alone
from slabformer.tasks.engine.seeds import reseed


@leaves_the_process_alone
def train(fail: bool = False) -> str:
    create_accelerator("bf16", "cpu")
    reseed(7)
    torch.set_num_threads(3)
    if fail:
        raise ValueError("failed")
    return "trained"


@pytest.fixture
def _clean() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("fail", [False, True], ids=["done", "failed"])
def test_the_caller_s_state_comes_back(fail: bool) -> None:
    mine = accelerate.Accelerator(mixed_precision="no", cpu=True)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads())
    if fail:
        with pytest.raises(ValueError, match="failed"):
            train(fail=True)
    else:
        assert train() == "trained"
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads())
    assert (AcceleratorState().mixed_precision, mine.mixed_precision) == ("no", "no")


@pytest.mark.usefixtures("_clean")
def test_where_accelerate_was_not_used_it_is_fresh_afterwards() -> None:
    train()
    assert not AcceleratorState._shared_state
    assert not PartialState._shared_state


@pytest.mark.parametrize("task", ["classification", "detection", "language"])
def test_every_task_trains_so(task: str) -> None:
    module = pytest.importorskip(f"slabformer.tasks.{task}.train")
    assert module.train.__wrapped__
