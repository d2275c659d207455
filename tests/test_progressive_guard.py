"""Gamma waits while training explodes, training that has diverged is stopped, and both survive a restart."""

from __future__ import annotations

import copy
import itertools
import json
import logging

import pytest
import torch
from torch import nn

from fading import C, Net
from slabformer import PRepBN, ProgressiveSchedule
from slabformer.progressive import DivergedError, Guard

GUARD = Guard(every=1, window=9)


def watched(total: int = 100, **settings: object) -> tuple[nn.Sequential, ProgressiveSchedule]:
    """Two norms and their schedule, past the guard's first observations."""
    model = nn.Sequential(PRepBN(C), PRepBN(C))
    schedule = ProgressiveSchedule(model, total, **{"fade": 0.5, "guard": GUARD, **settings})
    for _ in range(6):
        schedule.step(grad_norm=1.0)
    return model, schedule


def inflate_(norm: nn.Module, times: float) -> None:
    """As if activations into ``norm`` had grown ``times``."""
    norm.rep.running_var.mul_(times**2)
    norm.rep.running_mean.mul_(times)


def test_gamma_waits_while_activations_explode_and_says_which(caplog: pytest.LogCaptureFixture) -> None:
    model, schedule = watched()
    before = schedule.gamma
    inflate_(model[1], 50)
    schedule.step()
    moved = schedule.gamma  # what a step shows is read in the next one
    schedule.step()
    schedule.step()
    assert before > moved == schedule.gamma == pytest.approx(float(model[0].gamma))
    assert "gamma waits at" in caplog.text
    assert "activations into 1 are 50 times their running median" in caplog.text
    assert caplog.text.count("gamma waits") == 1


def test_gamma_moves_on_when_activations_are_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model, schedule = watched()
    inflate_(model[1], 50)
    for _ in range(3):
        schedule.step()
    waiting = schedule.gamma
    inflate_(model[1], 1 / 50)
    for _ in range(3):
        schedule.step()
    assert schedule.gamma < waiting
    assert "gamma moves on" in caplog.text


def test_gamma_waits_while_the_gradient_explodes(caplog: pytest.LogCaptureFixture) -> None:
    _, schedule = watched()
    schedule.step(grad_norm=torch.tensor(30.0))
    moved = schedule.gamma
    schedule.step(grad_norm=1.0)
    assert schedule.gamma == moved
    assert "the gradient is 30 times its running median" in caplog.text
    schedule.step(grad_norm=1.0)
    assert schedule.gamma < moved


def test_no_gradient_between_observations_escapes() -> None:
    _, schedule = watched(guard=Guard(every=4, window=9), total=1000)
    for step in range(40):
        schedule.step(grad_norm=30.0 if step == 29 else 1.0)
    assert schedule.state_dict()["waited"] > 0


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_gradients_that_a_loss_scaler_skips_raise_no_alarm(norm: float) -> None:
    _, schedule = watched()
    for _ in range(3):
        schedule.step(grad_norm=norm)
    assert schedule.state_dict()["waited"] == 0


def test_time_spent_waiting_is_made_up_for() -> None:
    model = nn.Sequential(PRepBN(C))
    schedule = ProgressiveSchedule(model, 100, fade=0.95, guard=Guard(every=1, window=50))  # 5 steps to spare
    seen = []
    for step in range(100):
        if step in (40, 50):
            inflate_(model[0], 50 if step == 40 else 1 / 50)
        assert not schedule.finished
        schedule.step()
        seen.append(schedule.gamma)
    assert schedule.finished
    assert (schedule.steps_done, schedule.state_dict()["waited"]) == (100, 10)
    assert all(0 <= before - after < 0.02 for before, after in itertools.pairwise(seen))


def test_waiting_ends_since_the_median_follows() -> None:
    model, schedule = watched()
    inflate_(model[1], 50)
    for _ in range(20):
        schedule.step()
    assert 0 < schedule.state_dict()["waited"] < 10


def test_slow_growth_raises_no_alarm() -> None:
    model, schedule = watched(total=400)
    for _ in range(300):
        inflate_(model[0], 1.05)  # 2e6 times in all
        schedule.step(grad_norm=1.0)
    assert schedule.state_dict()["waited"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_that_diverged_is_stopped_at_the_first_norm(value: float) -> None:
    model, schedule = watched()
    for norm in model:
        norm.rep.running_var.fill_(value)
    schedule.step()
    with pytest.raises(
        DivergedError, match="diverged at step 8: activations into 0 are not finite; lower the learning"
    ):
        schedule.step()


def test_activations_far_from_their_size_stop_training() -> None:
    model, schedule = watched()
    inflate_(model[1], 1e5)
    schedule.step()
    with pytest.raises(DivergedError, match=r"activations into 1 are 1e\+05 times their running median"):
        schedule.step()


def test_divergence_is_noticed_after_the_fade_too() -> None:
    model, schedule = watched(total=10)
    for _ in range(10):
        schedule.step()
    assert schedule.finished
    model[0].rep.running_mean.fill_(float("nan"))
    schedule.step()
    with pytest.raises(DivergedError, match="activations into 0"):
        schedule.step()


def test_without_a_guard_gamma_never_waits() -> None:
    model, schedule = watched(guard=None)
    inflate_(model[1], 1e6)
    for _ in range(4):
        schedule.step(grad_norm=1e9)
    assert schedule.state_dict()["waited"] == 0
    assert schedule.state_dict()["guard"] is None


def test_statistics_that_stand_still_while_warm_are_not_observed() -> None:
    """By the published rule they jump from (0, 1) to the data's when the fade begins."""
    model = nn.Sequential(PRepBN(C))
    schedule = ProgressiveSchedule(model, 100, warmup=0.2, fade=0.5, warm_statistics=False, guard=GUARD)
    for _ in range(20):
        schedule.step()
    inflate_(model[0], 100)
    for _ in range(10):
        schedule.step()
    assert schedule.state_dict()["waited"] == 0


@pytest.mark.parametrize("at", [6, 7, 8, 9, 12])
def test_a_restart_in_the_middle_of_waiting_changes_nothing(at: int) -> None:
    model, schedule = watched(fade=0.9)
    copied, other = copy.deepcopy(model), None
    gammas, again = [], []
    for step in range(6, 30):
        if step == at:
            state = json.loads(json.dumps(schedule.state_dict()))
            copied = copy.deepcopy(model)
            other = ProgressiveSchedule(copied, 100, fade=0.9, guard=GUARD)
            other.load_state_dict(state)
        for one, plan, seen in ((model, schedule, gammas), (copied, other, again)):
            if plan is None:
                continue
            if step in (7, 14):
                inflate_(one[0], 50 if step == 7 else 1 / 50)
            plan.step(grad_norm=1.0)
            seen.append(plan.gamma)
    assert again == gammas[-len(again) :]
    assert schedule.state_dict()["waited"] > 0
    assert other is not None
    assert other.state_dict() == schedule.state_dict()


def test_schedule_built_where_gamma_has_waited_goes_on_from_there() -> None:
    """As transformers' Trainer does: it knows the step, the model its gamma."""
    model, schedule = watched()
    inflate_(model[1], 50)
    for _ in range(5):
        schedule.step()
    other = ProgressiveSchedule(copy.deepcopy(model), 100, fade=0.5, start=schedule.steps_done)
    assert other.gamma == pytest.approx(schedule.gamma, abs=1e-6)
    assert other.steps_done == schedule.steps_done


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("limit", 1.0, "limit must be above 1, got 1.0"),
        ("stop", 0.5, "stop must be above 1, got 0.5"),
        ("window", 2, r"window must be .*\[3, 10000\], got 2"),
        ("every", 0, "every must be at least 1, got 0"),
    ],
)
def test_bad_limits_are_refused(setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**{setting: value})


def test_a_training_that_is_well_is_the_same_with_and_without_guard() -> None:
    results = []
    for guard in (None, GUARD):
        model = Net(dtype=torch.float32)
        schedule = ProgressiveSchedule(model, 20, guard=guard)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            model(torch.randn(4, 5, C, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        results.append(model.state_dict())
    assert all(torch.equal(one, results[1][name]) for name, one in results[0].items())
