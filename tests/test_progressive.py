"""The schedule: gamma and phase at every step, its state, the optimizer beside it, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fading import C, Net
from slabformer import PRepBN, ProgressiveSchedule, convert_norms_
from slabformer.nn.controls import prepbn_modules


@pytest.mark.parametrize(
    ("settings", "gammas", "phases"),
    [
        ({"fade": 0.8}, [1, 0.75, 0.5, 0.25, 0, 0], "FFFFDD"),
        ({"warmup": 0.4, "fade": 0.4}, [1, 1, 1, 0.5, 0, 0], "WWFFDD"),
        ({"warmup": 0.2, "fade": 0.8}, [1, 1, 0.75, 0.5, 0.25, 0], "WFFFFD"),
        ({"fade": 0.6, "shape": "cosine"}, [1, 0.75, 0.25, 0, 0, 0], "FFFDDD"),
        ({"fade": 1e-6}, [1, 0, 0, 0, 0, 0], "FDDDDD"),
    ],
    ids=["linear", "warmup", "to_the_end", "cosine", "at_once"],
)
def test_gamma_and_phase_at_every_step(settings: dict[str, Any], gammas: list[float], phases: str) -> None:
    norm = PRepBN(C)
    schedule = ProgressiveSchedule(norm, total_steps=5, **settings)
    seen = []
    for gamma in gammas:
        assert schedule.gamma == pytest.approx(gamma, abs=1e-12)
        assert float(norm.gamma) == pytest.approx(gamma, abs=1e-7)
        assert schedule.finished == (gamma == 0)
        assert norm.phase == schedule.phase
        seen.append(norm.phase[0].upper())
        schedule.step()
    assert "".join(seen) == phases


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100, 300_000])
@pytest.mark.parametrize("warmup", [0, 1 / 3, 0.5, 0.6, 0.9, 0.999])
def test_schedule_never_ends_after_training(total: int, warmup: float) -> None:
    schedule = ProgressiveSchedule(PRepBN(C), total, warmup=warmup, fade=1 - warmup)
    assert schedule.warmup_steps + schedule.fade_steps <= total
    schedule.load_state_dict({**schedule.state_dict(), "step": total - 1})
    schedule.step()
    assert schedule.finished


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number of at least 1"),
        ({"total_steps": 2.5}, "got 2.5"),
        ({"warmup": -0.1}, "warmup must be at least 0"),
        ({"fade": 0.0}, "fade above 0"),
        ({"fade": float("nan")}, "fade above 0"),
        ({"warmup": float("nan")}, "warmup must be at least 0"),
        ({"warmup": 0.3}, "end after training: warmup 0.3"),
        ({"fade": 1.1}, "end after training"),
        ({"shape": "step"}, "shape must be 'linear' or 'cosine', got 'step'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_change_nothing(settings: dict[str, Any], message: str) -> None:
    norm = PRepBN(C)
    norm.set_gamma(0.5)
    with pytest.raises(ValueError, match=message):
        ProgressiveSchedule(norm, **{"total_steps": 10, **settings})
    assert norm.gamma == 0.5


def test_model_without_prepbn_is_refused() -> None:
    with pytest.raises(ValueError, match="call convert_norms_"):
        ProgressiveSchedule(nn.LayerNorm(C), 10)


def unconverted() -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C))


def test_optimizer_built_before_conversion_is_refused_when_given() -> None:
    model = unconverted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norms_(model)
    with pytest.raises(ValueError, match=r"3 parameters of the norms \(first: 1.rep.weight\); build it after"):
        ProgressiveSchedule(model, 10, optimizer=optimizer)


def test_optimizer_built_before_conversion_is_noticed_at_the_first_step() -> None:
    model = unconverted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norms_(model)
    schedule = ProgressiveSchedule(model, 10)
    model(torch.randn(3, C)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="build it after convert_norms_"):
        schedule.step()


def test_right_optimizers_pass_split_or_frozen() -> None:
    model = unconverted()
    convert_norms_(model)
    model[1].norm.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD([p], 0.1) for p in parameters]
    schedule = ProgressiveSchedule(model, 2)
    model(torch.randn(3, C)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    schedule.step()
    assert schedule.gamma < 1


def test_forgotten_schedule_leaves_no_hook_behind() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks

    before = len(_global_optimizer_post_hooks)
    schedule = ProgressiveSchedule(PRepBN(C), 10)
    assert len(_global_optimizer_post_hooks) == before + 1
    del schedule
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("at", range(7))
def test_state_dict_goes_on_exactly_where_it_stood(shape: str, at: int) -> None:
    norm, resumed = PRepBN(C), PRepBN(C)
    schedule = ProgressiveSchedule(norm, 6, warmup=0.3, fade=0.5, shape=shape, warm_statistics=False)
    for _ in range(at):
        schedule.step()
    resumed.load_state_dict(norm.state_dict())
    other = ProgressiveSchedule(resumed, total_steps=99, fade=0.2)
    other.load_state_dict(schedule.state_dict())
    for _ in range(7 - at):
        assert (schedule.gamma, schedule.phase) == (other.gamma, other.phase)
        assert (norm.gamma, norm.phase) == (resumed.gamma, resumed.phase)
        assert norm.rep.warm_statistics == resumed.rep.warm_statistics
        schedule.step()
        other.step()
    assert all(isinstance(value, (int, str)) for value in schedule.state_dict().values())


def test_foreign_state_is_refused() -> None:
    schedule = ProgressiveSchedule(PRepBN(C), 6)
    with pytest.raises(ValueError, match="not a ProgressiveSchedule state"):
        schedule.load_state_dict({"last_epoch": 3})


def test_gradient_accumulation_moves_gamma_once_an_optimizer_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = ProgressiveSchedule(model, 4, fade=1.0, optimizer=optimizer)
    for step in range(4):
        for _ in range(3):
            assert all(norm.gamma == 1 - step / 4 for norm in prepbn_modules(model).values())
            model(torch.randn(2, 3, C, dtype=torch.float64)).mean().backward()
        optimizer.step()
        schedule.step()
    assert model.blocks[0][0].rep.num_batches_tracked == 12


def test_cosine_is_a_half_cosine() -> None:
    schedule = ProgressiveSchedule(PRepBN(C), 100, fade=1.0, shape="cosine")
    for step in range(100):
        assert schedule.gamma == pytest.approx((1 + math.cos(math.pi * step / 100)) / 2, abs=1e-12)
        schedule.step()
