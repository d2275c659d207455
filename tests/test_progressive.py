"""The schedule: gamma and phase at every step, its state, the optimizer beside it, and what it refuses."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import pickle
import weakref
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
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": 2.5}, "got 2.5"),
        ({"warmup": -0.1}, "warmup must be at least 0"),
        ({"fade": 0.0}, "fade must be above 0 and at most 1, got 0.0"),
        ({"fade": float("nan")}, "fade must be a finite number above 0"),
        ({"warmup": float("nan")}, "warmup must be a finite number of at least 0"),
        ({"warmup": 0.9}, "end after training: warmup 0.9"),
        ({"fade": 1.1}, "fade must be above 0 and at most 1, got 1.1"),
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


def faded(*gammas: float) -> nn.Sequential:
    norms = [PRepBN(C) for _ in gammas]
    for norm, gamma in zip(norms, gammas, strict=True):
        norm.set_gamma(gamma)
    return nn.Sequential(*norms)


def gammas_of(model: nn.Module) -> list[float]:
    return [float(norm.gamma) for norm in prepbn_modules(model).values()]


@pytest.mark.parametrize("settings", [{}, {"warmup": 0.5, "fade": 0.5}, {"shape": "cosine"}], ids=str)
def test_second_schedule_leaves_a_faded_model_faded_and_says_so(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = faded(0, 0)
    schedule = ProgressiveSchedule(model, 10, **settings)
    assert (schedule.gamma, schedule.finished, gammas_of(model)) == (0, True, [0, 0])
    for _ in range(3):
        schedule.step()
        assert gammas_of(model) == [0, 0]
    assert "the schedule goes on from its gamma of 0" in caplog.text
    assert "call set_gamma(1)" in caplog.text


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [0.999, 0.6, 0.3, 0.001])
def test_second_schedule_goes_on_from_the_gamma_of_a_half_faded_model(
    gamma: float, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = faded(gamma)
    schedule = ProgressiveSchedule(model, 1000, warmup=0.1, fade=0.5, shape=shape)
    seen = gammas_of(model)
    while not schedule.finished:
        schedule.step()
        seen += gammas_of(model)
    assert seen[0] == pytest.approx(gamma)
    assert seen[-1] == 0
    assert all(0 <= before - after < 0.02 for before, after in itertools.pairwise(seen))
    assert "goes on from its gamma" in caplog.text


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("total", [7, 1000])
def test_schedule_built_on_a_resumed_model_stands_at_the_right_step(total: int, shape: str) -> None:
    model = faded(1)
    schedule = ProgressiveSchedule(model, total, warmup=0.2, fade=0.5, shape=shape)
    for _ in range(total * 2 // 5):
        schedule.step()
    other = ProgressiveSchedule(copy.deepcopy(model), total, warmup=0.2, fade=0.5, shape=shape)
    seen = {"guard": None, "steps_done": 0}  # a new schedule has observed nothing
    assert other.state_dict() | seen == schedule.state_dict() | seen


def test_start_is_the_step_where_a_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = faded(0.5)
    schedule = ProgressiveSchedule(model, 10, fade=1.0, start=5)
    schedule.step()
    assert gammas_of(model) == pytest.approx([0.4])
    assert not caplog.text
    assert ProgressiveSchedule(faded(1), 10, fade=1.0, start=3).gamma == pytest.approx(0.7)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        ProgressiveSchedule(model, 10, start=-1)


def test_training_made_longer_does_not_bring_the_old_norm_back(caplog: pytest.LogCaptureFixture) -> None:
    model = faded(0)
    schedule = ProgressiveSchedule(model, 20, fade=0.8, start=10)
    assert schedule.finished
    assert gammas_of(model) == [0]
    assert "goes on from its gamma of 0" in caplog.text


def test_norms_that_faded_earlier_stay_so_while_others_fade(caplog: pytest.LogCaptureFixture) -> None:
    model = faded(0, 1)
    schedule = ProgressiveSchedule(model, 4, fade=1.0)
    seen = []
    for _ in range(5):
        seen.append(gammas_of(model))
        schedule.step()
    assert seen == [[0, 1], [0, 0.75], [0, 0.5], [0, 0.25], [0, 0]]
    assert not caplog.text


def test_norms_at_different_gammas_are_refused() -> None:
    model = faded(0.25, 1)
    with pytest.raises(ValueError, match=r"different gammas, 0\.25 to 1, .*bring them to one with set_gamma"):
        ProgressiveSchedule(model, 10)
    assert gammas_of(model) == [0.25, 1]


def test_fading_again_is_possible_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    model = faded(0)
    model[0].set_gamma(1)
    assert ProgressiveSchedule(model, 10).gamma == 1
    assert not caplog.text


def test_state_of_an_earlier_step_is_refused_on_a_model_that_has_faded_further() -> None:
    model = faded(1)
    schedule = ProgressiveSchedule(model, 4, fade=1.0)
    state = schedule.state_dict()
    for _ in range(3):
        schedule.step()
    with pytest.raises(ValueError, match=r"state is at gamma 1, but the model has faded to 0\.25; load the model's"):
        schedule.load_state_dict(state)
    assert schedule.gamma == 0.25
    model[0].set_gamma(1)
    schedule.load_state_dict(state)
    assert schedule.gamma == 1


def test_schedule_on_the_meta_device_begins_at_its_start() -> None:
    assert ProgressiveSchedule(faded(1).to("meta"), 10).gamma == 1


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


def test_optimizers_of_other_models_are_none_of_its_business() -> None:
    generator, critic = unconverted(), nn.Linear(C, 1)
    convert_norms_(generator)
    others = torch.optim.Adam(critic.parameters())
    optimizer = torch.optim.Adam(generator.parameters())
    schedule = ProgressiveSchedule(generator, 4, fade=1.0)
    for step in range(4):
        for _ in range(2):
            critic(generator(torch.randn(3, C))).sum().backward()
            others.step()
        if step:  # the critic is trained alone at first
            optimizer.step()
        schedule.step()
    assert schedule.finished


def test_wrong_optimizer_is_noticed_beside_those_of_other_models() -> None:
    model, critic = unconverted(), nn.Linear(C, 1)
    optimizer, others = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(critic.parameters(), 0.1)
    convert_norms_(model)
    schedule = ProgressiveSchedule(model, 10)
    critic(model(torch.randn(3, C))).sum().backward()
    others.step()
    schedule.step()
    optimizer.step()
    with pytest.raises(ValueError, match="build it after convert_norms_"):
        schedule.step()


def test_optimizers_that_take_turns_are_named_together() -> None:
    model = unconverted()
    convert_norms_(model)
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[1].parameters(), 0.1)]
    schedule = ProgressiveSchedule(model, 2, optimizer=optimizers)
    model(torch.randn(3, C)).sum().backward()
    optimizers[0].step()
    schedule.step()
    assert schedule.gamma < 1
    with pytest.raises(ValueError, match=r"pass optimizer=\[\.\.\.\] if several take turns"):
        ProgressiveSchedule(model, 2, optimizer=optimizers[0])


def test_parameter_groups_and_accelerates_wrapper_are_looked_into() -> None:
    from accelerate import Accelerator

    model = unconverted()
    convert_norms_(model)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "weight_decay": 0.0}]
    wrapped = Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD(groups, 0.1))
    for given in (wrapped, None):
        schedule = ProgressiveSchedule(model, 4, optimizer=given)
        model(torch.randn(3, C)).sum().backward()
        wrapped.step()
        schedule.step()
        assert schedule.gamma < 1
        model[1].set_gamma(1)


def test_steps_that_a_gradient_scaler_skips_are_no_mistake() -> None:
    model = unconverted()
    convert_norms_(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    schedule = ProgressiveSchedule(model, 4)
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(3, C)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert schedule.gamma < 1


@pytest.mark.parametrize("stepped", [False, True], ids=["watching", "checked"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_schedule_is_copied_and_pickled_with_its_model(copied: Any, stepped: bool) -> None:
    model = unconverted()
    convert_norms_(model)
    schedule = ProgressiveSchedule(model, 4, fade=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if stepped:
        model(torch.randn(3, C)).sum().backward()
        optimizer.step()
        schedule.step()
    other, progress = copied((model, schedule))
    assert progress.state_dict() == schedule.state_dict()
    right = torch.optim.SGD(other.parameters(), 0.1)
    other(torch.randn(3, C)).sum().backward()
    right.step()
    progress.step()
    assert gammas_of(other) == [progress.gamma] == [schedule.gamma - 0.25]
    assert gammas_of(model) == [schedule.gamma]


def test_copy_of_a_schedule_still_notices_a_wrong_optimizer() -> None:
    model = unconverted()
    convert_norms_(model)
    other, schedule = copy.deepcopy((model, ProgressiveSchedule(model, 4)))
    wrong = torch.optim.SGD(other[1].norm.parameters(), 0.1)
    other(torch.randn(3, C)).sum().backward()
    wrong.step()
    with pytest.raises(ValueError, match="build it after convert_norms_"):
        schedule.step()


def test_schedule_keeps_no_model_alive() -> None:
    model = unconverted()
    convert_norms_(model)
    reference, schedule = weakref.ref(model), ProgressiveSchedule(model, 4)
    del model
    gc.collect()
    assert reference() is None
    schedule.step()


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
    assert json.loads(json.dumps(schedule.state_dict())) == schedule.state_dict()


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
