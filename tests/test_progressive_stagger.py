"""Norms that fade one after the other, and the term that draws RepBN towards the norm that it replaces."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fading import MASKS, C, Net, aligned_gradients, train
from slabformer import PRepBN, ProgressiveSchedule, token_mask
from tolerances import assert_close


def three() -> nn.Sequential:
    return nn.Sequential(PRepBN(C), PRepBN(C), PRepBN(C))


def course(schedule: ProgressiveSchedule, steps: int) -> list[list[float]]:
    """Gammas of all norms at every step."""
    seen = []
    for _ in range(steps):
        seen.append([*schedule.gammas.values()])
        schedule.step()
    return seen


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_norms_fade_one_after_the_other(shape: str) -> None:
    model = three()
    seen = course(ProgressiveSchedule(model, 100, fade=0.8, shape=shape, stagger=0.5), 100)
    first, second, third = zip(*seen, strict=True)
    begins = [next(i for i, gamma in enumerate(column) if gamma < 1) for column in (first, second, third)]
    ends = [next(i for i, gamma in enumerate(column) if gamma == 0) for column in (first, second, third)]
    assert begins == [1, 21, 41]
    assert ends == [40, 60, 80]
    assert [float(norm.gamma) for norm in model] == [0, 0, 0]
    assert all(a >= b for column in (first, second, third) for a, b in itertools.pairwise(column))


def test_gamma_is_the_mean_over_the_norms() -> None:
    schedule = ProgressiveSchedule(three(), 10, fade=1.0, stagger=0.5)
    for _ in range(10):
        assert schedule.gamma == pytest.approx(sum(schedule.gammas.values()) / 3)
        schedule.step()
    assert schedule.gamma == 0


@pytest.mark.parametrize(
    ("order", "first_to_last"),
    [
        ("depth", ["0", "1", "2"]),
        (["2", "0", "1"], ["2", "0", "1"]),
        ({"0": 0.3, "1": 0.1, "2": 0.2}, ["1", "2", "0"]),
    ],
    ids=["depth", "names", "sensitivity"],
)
def test_order_says_which_norms_begin(order: Any, first_to_last: list[str]) -> None:
    schedule = ProgressiveSchedule(three(), 100, fade=0.8, stagger=0.5, order=order)
    for _ in range(45):  # done, half way, just begun
        schedule.step()
    assert sorted(schedule.gammas, key=schedule.gammas.__getitem__) == first_to_last


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["0", "1"], "'2' is named not"),
        (["0", "1", "2", "3"], "'3' is named without need"),
        (["0", "1", "2", "2"], "'2' is named twice"),
        ({"norm": 1.0}, "order must name every norm of the model once"),
    ],
    ids=str,
)
def test_orders_that_do_not_fit_are_refused(order: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveSchedule(three(), 10, stagger=0.5, order=order)


def test_all_norms_change_phase_together() -> None:
    """Compiled code is built for three phases, not for each norm's own."""
    model = three()
    schedule = ProgressiveSchedule(model, 20, warmup=0.2, fade=0.6, stagger=0.5)
    phases = []
    for _ in range(20):
        found = {norm.phase for norm in model}
        assert found == {schedule.phase}
        phases.append(schedule.phase[0])
        schedule.step()
    assert "".join(phases) == "w" * 4 + "f" * 12 + "d" * 4


def test_staggered_fade_trains_to_the_end() -> None:
    assert all(value.isfinite().all() for value in train(Net(), steps=12, stagger=0.5))


@pytest.mark.parametrize("at", [1, 9, 17, 29])
def test_staggered_fade_goes_on_from_its_state_and_from_its_model(at: int) -> None:
    settings: dict[str, Any] = {"warmup": 0.1, "fade": 0.8, "stagger": 0.6, "order": ["1", "2", "0"]}
    model = three()
    schedule = ProgressiveSchedule(model, 30, **settings)
    for _ in range(at):
        schedule.step()
    fresh = three()
    loaded = ProgressiveSchedule(fresh, 30)
    fresh.load_state_dict(model.state_dict())
    loaded.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    built = ProgressiveSchedule(copy.deepcopy(model), 30, start=at, **settings)
    rest = course(schedule, 30 - at)
    assert course(loaded, 30 - at) == rest
    assert course(built, 30 - at) == rest


def test_second_staggered_schedule_never_raises_a_gamma() -> None:
    model = three()
    schedule = ProgressiveSchedule(model, 30, stagger=0.6)
    for _ in range(12):
        schedule.step()
    before = [float(norm.gamma) for norm in model]
    again = ProgressiveSchedule(model, 50, stagger=0.6)
    assert all(float(norm.gamma) <= gamma for norm, gamma in zip(model, before, strict=True))
    course(again, 50)
    assert again.finished


def test_states_of_version_0_1_are_read() -> None:
    schedule = ProgressiveSchedule(three(), 10, fade=0.8)
    old = {key: schedule.state_dict()[key] for key in ("total_steps", "warmup_steps", "fade_steps", "shape")}
    schedule.load_state_dict({**old, "step": 4, "warm_statistics": True})
    assert schedule.gamma == pytest.approx(0.5)


def test_state_of_other_norms_is_refused() -> None:
    state = ProgressiveSchedule(three(), 10).state_dict()
    with pytest.raises(ValueError, match="the state is of other norms than the model's"):
        ProgressiveSchedule(nn.Sequential(PRepBN(C)), 10).load_state_dict(state)


def forward(model: nn.Module, mask: Tensor | None = None) -> Tensor:
    x = 1 + torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with token_mask(model, mask):
        return model(x)


@pytest.mark.parametrize("warmup", [0.0, 0.5], ids=["fading", "warm"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_alignment_is_the_relative_distance_of_the_branches(mask: Tensor | None, warmup: float) -> None:
    norm = PRepBN(C, dtype=torch.float64)
    nn.init.normal_(norm.rep.weight, 1.0)
    schedule = ProgressiveSchedule(norm, 10, warmup=warmup, fade=0.5, align=0.3)
    inputs: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    forward(norm, mask)
    handle.remove()
    term = schedule.alignment()
    with token_mask(norm, mask):
        rep, old = norm.rep(inputs[0]), norm.norm(inputs[0])
    counts = slice(None) if mask is None else mask
    expected = 0.3 * (rep - old)[counts].square().sum() / old[counts].square().sum()
    assert_close(term.double(), expected, 1e-6)


def test_outputs_are_the_same_with_and_without_alignment() -> None:
    """At any gamma, the old norm alone at 1 included; gradients of the loss follow."""
    for steps in (0, 3):
        outputs, gradients = [], []
        for align in (0.0, 0.5):
            model = Net()
            schedule = ProgressiveSchedule(model, 10, fade=1.0, align=align)
            for _ in range(steps):
                schedule.step()
            out = forward(model)
            out.square().mean().backward()
            schedule.alignment()
            outputs.append(out)
            gradients.append([p.grad for p in model.parameters()])
        assert_close(outputs[1], outputs[0], 1e-10)
        for with_term, without in zip(*gradients[::-1], strict=True):
            assert_close(with_term, without, 1e-9)


def test_alignment_draws_rep_towards_the_norm() -> None:
    """Gradients reach RepBN's parameters and the layers in front, and never the norm that fades."""
    model = Net()
    schedule = ProgressiveSchedule(model, 200, warmup=0.9, fade=0.1, align=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    terms = []
    for _ in range(60):
        forward(model)
        term = schedule.alignment()
        optimizer.zero_grad()
        term.backward()
        assert all(p.grad is None for p in model.blocks[1][0].norm.parameters())
        optimizer.step()
        schedule.step()
        terms.append(term.item())
    assert terms[-1] < 0.5 * terms[0]
    assert model.blocks[0][1].weight.grad.any()


def test_alignment_under_activation_checkpointing() -> None:
    terms, gradients = zip(*(aligned_gradients(Net(reentrant)) for reentrant in (None, False)), strict=True)
    assert_close(terms[1], terms[0], 1e-10)
    for actual, expected in zip(*gradients[::-1], strict=True):
        assert_close(actual, expected, 1e-10)


def test_reentrant_checkpointing_is_refused() -> None:
    model = Net(reentrant=True)
    schedule = ProgressiveSchedule(model, 10, align=1.0)
    x = torch.randn(2, 5, C, dtype=torch.float64, requires_grad=True)
    model(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        schedule.alignment()


def test_alignment_that_is_not_in_the_loss_is_an_error() -> None:
    model = Net()
    schedule = ProgressiveSchedule(model, 10, align=0.1)
    forward(model)
    with pytest.raises(RuntimeError, match=r"align=0.1 is without effect: add schedule.alignment\(\) to the loss"):
        schedule.step()


def test_alignment_before_any_forward_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="call alignment\\(\\) after the model's forward"):
        ProgressiveSchedule(Net(), 10, align=0.1).alignment()


def test_alignment_is_zero_where_nothing_is_left_to_align() -> None:
    model = Net()
    schedule = ProgressiveSchedule(model, 2, fade=0.5, align=0.1)
    for _ in range(2):
        forward(model)
        schedule.alignment()
        schedule.step()
    assert schedule.finished
    forward(model)
    assert schedule.alignment() == 0
    assert ProgressiveSchedule(Net(), 10).alignment() == 0


def test_evaluation_and_copies_leave_no_alignment_behind() -> None:
    model = Net()
    schedule = ProgressiveSchedule(model, 10, align=0.1)
    forward(model)
    copy.deepcopy(model)
    schedule.alignment()
    model.eval()
    forward(model)
    schedule.step()
