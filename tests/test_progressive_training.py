"""Training while norms fade: as published, checkpointed, resumed, without waiting for the device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fading import MASKS, C, Net, assert_all_close, train
from golden import fill
from slabformer import PRepBN, ProgressiveSchedule, fit_norms_, token_mask
from tolerances import ALGEBRA, EXACT, assert_close

GOLDEN = Path(__file__).parent / "golden" / "prepbn_training.npz"
PUBLISHED = {
    "norm.weight": "norm1.weight",
    "norm.bias": "norm1.bias",
    "rep.eta": "norm2.alpha",
    "rep.weight": "norm2.bn.weight",
    "rep.bias": "norm2.bn.bias",
    "rep.running_mean": "norm2.bn.running_mean",
    "rep.running_var": "norm2.bn.running_var",
}


def test_linear_schedule_reproduces_the_published_training() -> None:
    golden = np.load(GOLDEN)
    norm = PRepBN(C, eps=1e-6)
    for ours, theirs in PUBLISHED.items():
        value = norm.state_dict()[ours]
        value.copy_(torch.from_numpy(fill.values(theirs, tuple(value.shape))))
    schedule = ProgressiveSchedule(norm, 6, warmup=2 / 6, fade=3 / 6, warm_statistics=False)
    inputs = torch.from_numpy(golden["inputs"]).float()
    for step in range(6):
        x = inputs[step].clone().requires_grad_()
        y = norm(x)
        (y * inputs[6]).sum().backward()
        schedule.step()
        assert_close(y, torch.from_numpy(golden["outputs"][step]), 1e-6)
        assert_close(x.grad, torch.from_numpy(golden["input_grads"][step]), 1e-6)
    for ours, theirs in PUBLISHED.items():
        assert_close(norm.state_dict()[ours], torch.from_numpy(golden[f"final.{theirs}"]), 1e-6)
        if "running" not in ours:
            assert_close(norm.get_parameter(ours).grad, torch.from_numpy(golden[f"grad.{theirs}"]), 1e-6)
    assert norm.rep.num_batches_tracked == int(golden["final.norm2.bn.num_batches_tracked"])
    assert norm.phase == "done"
    assert_close(norm.eval()(inputs[6]), torch.from_numpy(golden["eval_output"]), 1e-6)


def test_statistics_of_the_published_rule_stand_still_while_gamma_is_held() -> None:
    for warm_statistics in (True, False):
        norm = PRepBN(C)
        schedule = ProgressiveSchedule(norm, 4, warmup=0.5, fade=0.5, warm_statistics=warm_statistics)
        for _ in range(2):
            norm(torch.randn(3, C))
            schedule.step()
        assert norm.rep.num_batches_tracked == (2 if warm_statistics else 0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing_changes_nothing(reentrant: bool, mask: Tensor | None) -> None:
    assert_all_close(train(Net(reentrant), mask=mask), train(Net(), mask=mask), ALGEBRA)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_backward_outside_the_mask_block_is_refused_under_checkpointing(reentrant: bool) -> None:
    model = Net(reentrant)
    ProgressiveSchedule(model, 10)
    x = torch.randn(2, 5, C, dtype=torch.float64, requires_grad=True)
    with token_mask(model, MASKS["mask"]):
        loss = model(x).mean()
    with pytest.raises(RuntimeError, match="keep backward\\(\\) inside"):
        loss.backward()


class NoSync(TorchDispatchMode):
    """Refuses whatever reads a tensor's values on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(op in name for op in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")), name
        return func(*args, **(kwargs or {}))


def test_what_is_read_back_is_seen() -> None:
    with NoSync(), pytest.raises(AssertionError, match="aten::_local_scalar_dense"):
        float(torch.ones(1))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointed"])
def test_training_never_reads_back_from_the_device(reentrant: bool | None, mask: Tensor | None) -> None:
    with NoSync():
        train(Net(reentrant), mask=mask)


def test_fitted_start_then_training_stays_finite_from_huge_activations() -> None:
    model = Net()
    x = 1e4 * torch.randn(4, 5, C, dtype=torch.float64)
    fit_norms_(model, [x])
    schedule = ProgressiveSchedule(model, 3, fade=1.0)
    for _ in range(3):
        assert model(x).isfinite().all()
        schedule.step()


def test_resumed_training_is_bit_identical() -> None:
    straight = Net()
    optimizer = torch.optim.SGD(straight.parameters(), 0.1, momentum=0.9)
    schedule = ProgressiveSchedule(straight, 8, warmup=0.25, fade=0.5)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: ProgressiveSchedule, seed: int) -> None:
        x = torch.randn(2, 5, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()

    saved = []
    for seed in range(8):
        saved.append(copy.deepcopy((straight.state_dict(), optimizer.state_dict(), schedule.state_dict())))
        step(straight, optimizer, schedule, seed)
    for at, (weights, momenta, progress) in enumerate(saved):
        resumed = Net()
        optimizer = torch.optim.SGD(resumed.parameters(), 0.1, momentum=0.9)
        schedule = ProgressiveSchedule(resumed, 8, warmup=0.25, fade=0.5)
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(momenta)
        schedule.load_state_dict(progress)
        for seed in range(at, 8):
            step(resumed, optimizer, schedule, seed)
        for name, value in resumed.state_dict().items():
            assert_close(value, straight.state_dict()[name], EXACT)
