from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distributed import run_ranks
from slabformer import PRepBN, RepBN, recalibrate_, sync_norms_, token_mask
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close

C = 4


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(PRepBN(C, eta=0.75), nn.Linear(C, C), nn.Dropout(0.5), RepBN(C))
        self.double().train()
        self[0].set_gamma(0.5)
        self[1].eval()


def data(num: int = 12) -> Tensor:
    return 3 + torch.randn(num, 5, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "running" in name}


def assert_population(norm: RepBN, x: Tensor) -> None:
    assert_close(norm.running_mean, x.flatten(0, -2).mean(0), ALGEBRA)
    assert_close(norm.running_var, x.flatten(0, -2).var(0, unbiased=False), ALGEBRA)


def test_statistics_are_the_populations_and_nothing_else_changes() -> None:
    model, x = Net(), data()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    assert recalibrate_(model, x.split(4)) == 3
    assert_population(model[0].rep, x)
    assert [module.training for module in model.modules()] == modes
    assert model[0].phase == "fading"
    for name, value in model.state_dict().items():
        if "running" not in name:
            assert_close(value, before[name], EXACT)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_later_norms_see_what_batch_statistics_gave() -> None:
    model, x = Net(), data()
    recalibrate_(model, [x])
    rep = model[0].rep
    normalised = (x - rep.running_mean) / (rep.running_var + rep.eps).sqrt() + 0.75 * x
    assert_population(model[3], model[1](normalised).detach())


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12), offset=st.sampled_from([0.0, 1.0, 100.0]))
def test_any_split_gives_the_same_at_the_first_norm(sizes: list[int], offset: float) -> None:
    model = Net()
    x = data(sum(sizes)) + offset
    recalibrate_(model, x.split(sizes))
    mean, var = x.flatten(0, 1).mean(0), x.flatten(0, 1).var(0, unbiased=False)
    assert_close(model[0].rep.running_mean, mean, ALGEBRA)
    assert_close(model[0].rep.running_var, var, ALGEBRA)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda parts: (part for part in parts),
        lambda parts: [(part, torch.zeros(len(part))) for part in parts],
        lambda parts: [[part, "label"] for part in parts],
        lambda parts: [{"input": part} for part in parts],
    ],
    ids=["generator", "tuples", "lists", "mappings"],
)
def test_batches_come_in_any_usual_form(wrap: Any) -> None:
    model, x = Net(), data()
    recalibrate_(model, wrap(x.split(5)))
    assert_population(model[0].rep, x)


def test_forward_overrides_how_a_batch_is_fed() -> None:
    model, x = Net(), data()
    recalibrate_(model, [{"pixels": x}], forward=lambda net, batch: net(batch["pixels"]))
    assert_population(model[0].rep, x)


def test_num_batches_takes_no_batch_too_many() -> None:
    model, x = Net(), data()
    batches = iter(x.split(2))
    assert recalibrate_(model, batches, num_batches=2) == 2
    assert_population(model[0].rep, x[:4])
    assert torch.equal(next(batches), x[4:6])


def test_masked_tokens_stay_out() -> None:
    model, x = Net(), data(2)
    mask = torch.rand(2, 5) > 0.4
    with token_mask(model, mask):
        recalibrate_(model, [x])
    valid = x[mask]
    assert_close(model[0].rep.running_var, valid.var(0, unbiased=False), ALGEBRA)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_gamma_does_not_matter(gamma: float) -> None:
    model, x = Net(), data()
    model[0].set_gamma(gamma)
    expected = Net()
    recalibrate_(expected, [x])
    recalibrate_(model, [x])
    for name, value in statistics(model).items():
        assert_close(value, statistics(expected)[name], EXACT)


def test_half_precision_normalises_by_unrounded_statistics() -> None:
    model = nn.Sequential(RepBN(C, eta=0.0, dtype=torch.bfloat16), nn.Identity(), RepBN(C, dtype=torch.bfloat16))
    x = (100 + torch.randn(64, 5, C)).bfloat16()
    recalibrate_(model, [x])
    assert_close(model[2].running_mean + 1, torch.ones(C), 0.01)
    assert_close(model[2].running_var, torch.ones(C), 0.01)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch to run"),
        (iter(()), "no batch to run"),
        ([data(), data().fill_(float("nan"))], "statistics of 0.rep are not finite"),
        ([data() * 1e200], "statistics of 0.rep are not finite"),
    ],
    ids=["empty", "used_up", "nan", "overflow"],
)
def test_bad_data_is_refused_and_changes_nothing(batches: Any, message: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        recalibrate_(model, batches)
    for name, value in model.state_dict().items():
        assert_close(value, before[name], EXACT)
    assert model[0].rep.accumulator is None


def test_a_float16_model_holds_variances_beyond_float16() -> None:
    model, x = nn.Sequential(RepBN(C, dtype=torch.float16)), (1000 * torch.randn(64, C)).half()
    recalibrate_(model, [x])
    assert_close(model[0].running_var, x.float().var(0, correction=0), FLOAT32)


def test_variance_that_float32_cannot_hold_is_refused() -> None:
    model = nn.Sequential(RepBN(C))
    with pytest.raises(ValueError, match=r"statistics of 0 are not finite: .*; check the data"):
        recalibrate_(model, [1e25 * torch.randn(64, C)])
    assert model[0].running_var.isfinite().all()


def test_error_inside_the_model_leaves_no_trace() -> None:
    model = Net()
    with pytest.raises(ValueError, match="got input of shape"):
        recalibrate_(model, [data(), torch.zeros(2, 5, C + 1, dtype=torch.float64)])
    assert model[0].rep.accumulator is None
    assert model.training


def test_strange_batch_and_missing_norms_are_named() -> None:
    with pytest.raises(TypeError, match="cannot feed a batch of type str"):
        recalibrate_(Net(), ["text"])
    with pytest.raises(ValueError, match="Linear has no RepBN"):
        recalibrate_(nn.Linear(C, C), [data()])


def test_norm_that_no_batch_reached_keeps_what_it_had() -> None:
    model = Net()
    model.add_module("idle", RepBN(C))
    model.idle.running_mean.fill_(7)
    model.forward = lambda x: model[0](x)
    recalibrate_(model, [data()])
    assert (model.idle.running_mean == 7).all()
    assert_population(model[0].rep, data())


def recalibrate_rank(rank: int, num_ranks: int, parts: list[list[int]]) -> dict[str, Tensor]:
    model, batches = Net(), data().split(3)
    sync_norms_(model)
    recalibrate_(model, [batches[index] for index in parts[rank]])
    return statistics(model)


@pytest.mark.parametrize(
    ("parts", "as_one"),
    [
        ([[0, 1], [2, 3]], [[0, 2], [1, 3]]),
        ([[0], [1, 2, 3]], [[0, 1], [2], [3]]),
        ([[0, 1, 2, 3], []], [[0], [1], [2], [3]]),
    ],
    ids=["equal", "unequal", "one_has_none"],
)
def test_ranks_agree_with_one_process_that_sees_their_batches_together(
    tmp_path: Path, parts: list[list[int]], as_one: list[list[int]]
) -> None:
    model, batches = Net(), data().split(3)
    recalibrate_(model, [torch.cat([batches[index] for index in together]) for together in as_one])
    for rank in run_ranks(recalibrate_rank, tmp_path, parts):
        for name, value in rank.items():
            assert_close(value, statistics(model)[name], ALGEBRA)
