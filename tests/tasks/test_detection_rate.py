"""Learning rates and decay of detectors are the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from detectors import small_detector
from slabformer import PRepBN, RepBN
from slabformer.tasks.detection.build import decay_groups
from slabformer.tasks.detection.config import DecayConfig, RateConfig
from slabformer.tasks.detection.rate import RateSchedule
from slabformer.tasks.engine.build import build_optimizer

STEPS_PER_EPOCH = 7_330


def schedule(config: RateConfig, epochs: int = 12, steps: int = STEPS_PER_EPOCH, lr: float = 1e-4) -> RateSchedule:
    return RateSchedule(
        torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr), config, epochs=epochs, steps_per_epoch=steps
    )


def rate_after(made: RateSchedule, step: int) -> float:
    made.step_update(step)
    return made.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("step", [0, 1, 250, 499])
def test_the_warm_up_is_linear_by_step_as_published(step: int) -> None:
    expected = 1e-4 * (1 - (1 - step / 500) * (1 - 0.001))
    assert rate_after(schedule(RateConfig()), step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (500, 1e-4),
        (8 * STEPS_PER_EPOCH - 1, 1e-4),
        (8 * STEPS_PER_EPOCH, 1e-5),
        (11 * STEPS_PER_EPOCH - 1, 1e-5),
        (11 * STEPS_PER_EPOCH, 1e-6),
        (12 * STEPS_PER_EPOCH, 1e-6),
    ],
)
def test_it_falls_with_the_first_step_after_a_milestone(step: int, rate: float) -> None:
    assert rate_after(schedule(RateConfig()), step) == pytest.approx(rate, rel=1e-12)


def test_a_cosine_ends_at_0() -> None:
    made = schedule(RateConfig(name="cosine", warmup_steps=0), epochs=2, steps=10, lr=1.0)
    assert [rate_after(made, step) for step in (0, 10, 20)] == pytest.approx([1.0, 0.5, 0.0])


def test_groups_keep_their_own_rates_through_a_resume() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)])
    made = RateSchedule(optimizer, RateConfig(warmup_steps=0), epochs=12, steps_per_epoch=1)
    made.step_update(9)
    state, groups = made.state_dict(), optimizer.state_dict()
    again = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 5.0} for _ in range(2)])
    restored = RateSchedule(again, RateConfig(warmup_steps=0), epochs=12, steps_per_epoch=1)
    again.load_state_dict(groups)
    restored.load_state_dict(state)
    restored.step_update(10)
    assert [group["lr"] for group in again.param_groups] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 24}, r"warmup_steps \(24\) must be below the 24 steps"),
        ({"milestones": [8, 12], "warmup_steps": 0}, r"milestones \[8, 12\] must be below epochs \(12\)"),
        ({"milestones": [11, 8]}, "rising epochs"),
        ({"milestones": [0]}, r"milestones\[0\] must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(RateConfig(**changes), steps=2)


def test_the_rate_scales_with_the_total_batch() -> None:
    config = DecayConfig(lr=1e-4, lr_base_batch=16)
    optimizer = build_optimizer(config, nn.Linear(2, 2), 4, lambda model: decay_groups(config, model))
    assert {group["lr"] for group in optimizer.param_groups} == {0.25e-4}


def decayed(config: DecayConfig, model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(config, model, 16, lambda model: decay_groups(config, model)).param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    return {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}


def test_decay_spares_norms_and_relative_positions_and_nothing_else_as_published() -> None:
    detector = small_detector("slab_swin_tiny")
    names = {name for name, _ in detector.named_parameters()}
    spared = names - decayed(DecayConfig(decay_vectors=True), detector)
    assert {name for name in names if "norm" in name or "relative_position_bias_table" in name} == spared
    kept = {"rpn.head.cls_logits.bias", "backbone.body.body.stages.0.blocks.0.attn.positional_encoding"}
    assert kept <= names - spared
    assert any(name.endswith("rep.eta") for name in spared)


def test_norms_are_spared_whatever_they_are_called() -> None:
    model = nn.ModuleDict({"ln_1": PRepBN(4), "bn": RepBN(4), "linear": nn.Linear(4, 4)})
    assert decayed(DecayConfig(decay_vectors=True), model) == {"linear.weight", "linear.bias"}
    assert "ln_1.rep.eta" in decayed(DecayConfig(decay_vectors=True, no_decay=[]), model)


def test_everything_decays_where_nothing_is_spared_as_published_for_pvt() -> None:
    detector = small_detector("pvt_tiny_prepbn")
    config = DecayConfig(decay_vectors=True, no_decay=[])
    assert decayed(config, detector) == {name for name, _ in detector.named_parameters()}


def test_vectors_do_not_decay_by_default() -> None:
    detector = small_detector("pvt_tiny_prepbn")
    assert all(detector.get_parameter(name).ndim > 1 for name in decayed(DecayConfig(), detector))


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    groups = decay_groups(DecayConfig(), model)
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert groups[0]["params"][0] is model.bias


def test_layer_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_decay is for classifiers"):
        DecayConfig(layer_decay=0.9)
