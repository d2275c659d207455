"""What losing a norm costs is what happens when it is lost; the plan takes what the budget allows."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer.surgery.conversion_plan import ConversionPlan
from slabformer.surgery.sensitivity import norm_costs

C = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(C), nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Encoder(nn.Module):
    """Three pre-norm blocks; between the first two, tokens get sizes of their own, which no line can undo."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.LayerNorm(C)
        for norm in (*(block.norm for block in self.blocks), self.last):
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.0, 0.2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        sizes = 1 + 20 * (x[..., :1] > 1)
        x = self.blocks[0](x) * sizes
        x = self.blocks[1](x) / sizes
        return self.last(self.blocks[2](x))


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, C, generator=generator) for _ in range(count)]


def captured(model: nn.Module, name: str, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return tuple(torch.cat(column).flatten(0, -2).double() for column in zip(*seen, strict=True))


@pytest.fixture(scope="module")
def model() -> Encoder:
    return Encoder().eval()


@pytest.fixture(scope="module")
def report(model: Encoder) -> Any:
    return sf.audit(model, batches=batches())


def test_r2_and_its_rest_are_those_of_least_squares(model: Encoder, report: Any) -> None:
    for cost in report.costs:
        x, y = captured(model, cost.name, batches())
        errors = torch.empty_like(y)
        for channel in range(C):
            design = torch.stack([x[:, channel], torch.ones(len(x))], dim=1).double()
            solution = torch.linalg.lstsq(design, y[:, channel : channel + 1]).solution
            errors[:, channel : channel + 1] = y[:, channel : channel + 1] - design @ solution
        squares = errors.square()
        variance = (y - y.mean(0)).square().sum()
        assert cost.r2 == pytest.approx(1 - float(squares.sum() / variance), abs=1e-6)
        assert cost.channels == pytest.approx(float(squares.sum(0).max() / squares.sum()), rel=1e-4)
        assert cost.tokens == pytest.approx(float(squares.sum(1).max() / squares.sum()), rel=1e-4)
        assert cost.first_token == pytest.approx(float(squares.view(-1, 6, C)[:, 0].sum() / squares.sum()), rel=1e-4)


def test_the_norm_behind_tokens_of_different_sizes_is_the_hardest(report: Any) -> None:
    costs = {cost.name: cost for cost in report.costs}
    assert list(costs) == ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "last"]
    assert min(costs, key=lambda name: costs[name].r2) == "blocks.1.norm"


def test_cost_alone_is_that_of_a_model_without_the_norm(model: Encoder, report: Any) -> None:
    """Converted and fitted by itself; the fit of one norm is the same line."""
    cost = next(cost for cost in report.costs if cost.name == "blocks.2.norm")
    student = copy.deepcopy(model)
    sf.convert_norms_(student, plan=["blocks.2.norm"])
    sf.fit_norms_(student, batches())
    with torch.no_grad():
        cosine = [nn.functional.cosine_similarity(student.eval()(x), model(x), dim=-1) for x in batches()]
    assert cost.alone == pytest.approx(1 - float(torch.cat(cosine).mean()), rel=1e-3)


def test_audit_changes_nothing(model: Encoder) -> None:
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    model.train()
    sf.audit(model, batches=batches())
    assert all(module.training for module in model.modules())
    model.eval()
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_budget_takes_as_many_of_the_cheapest_as_fit(model: Encoder, report: Any) -> None:
    order = [cost.name for cost in sorted(report.costs, key=lambda cost: cost.alone)]
    joint = {}
    for number in range(1, 5):
        student = copy.deepcopy(model)
        sf.convert_norms_(student, plan=order[:number])
        sf.fit_norms_(student, batches())
        with torch.no_grad():
            cosine = [nn.functional.cosine_similarity(student.eval()(x), model(x), dim=-1) for x in batches()]
        joint[number] = 1 - float(torch.cat(cosine).mean())
    for number in (1, 2, 3, 4):
        plan = norm_costs(model, batches(), budget=joint[number] * 1.001)[1]
        assert plan.cost == pytest.approx(joint[len(plan.take)], rel=1e-4)
        assert set(plan.take) == set(order[: len(plan.take)])
        assert len(plan.take) >= number
        assert set(plan.take) | set(plan.keep) == set(order)


def test_a_budget_that_cannot_be_met_says_what_was_reached(model: Encoder) -> None:
    with pytest.raises(ValueError, match=r"no norm can go within a budget of 1e-09: losing .* the cheapest, costs"):
        sf.audit(model, batches=batches(), budget=1e-9)


def test_a_partial_conversion_folds_what_went_and_keeps_the_rest(model: Encoder, report: Any) -> None:
    student = copy.deepcopy(model)
    plan = ConversionPlan(take=("blocks.0.norm", "blocks.2.norm"), keep=("blocks.1.norm", "last"), cost=0.1)
    assert list(sf.convert_norms_(student, plan=plan)) == ["blocks.0.norm", "blocks.2.norm"]
    sf.fit_norms_(student, batches())
    for norm in (student.blocks[0].norm, student.blocks[2].norm):
        norm.set_gamma(0)
    fused, outcome = sf.fuse(student.eval(), batches()[0])
    assert outcome.num_folded == 2
    assert isinstance(fused.blocks[1].norm, nn.LayerNorm)
    assert isinstance(fused.last, nn.LayerNorm)
    sf.verify(student, fused, batches()[0])


def test_a_plan_goes_through_json(report: Any) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert ConversionPlan.from_dict(data["plan"]) == report.plan
    assert [cost["name"] for cost in data["costs"]] == [cost.name for cost in report.costs]


@pytest.mark.parametrize(
    "data",
    [None, [], {"take": ["a"]}, {"take": "a", "keep": [], "cost": 0}, {"take": [1], "keep": [], "cost": 0}],
    ids=str,
)
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a conversion plan"):
        ConversionPlan.from_dict(data)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            ["blocks.0.norm", "blocks.9.norm"],
            r"names 1 norm that the model does not have or that cannot be converted \(first: 'blocks.9.norm'\)",
        ),
        (ConversionPlan(take=("last",), keep=("mlp",), cost=0), "first: 'mlp'"),
        (["a", "b"], "names 2 norms that the model does not have"),
        ([], "the plan takes no norm"),
        ("last", r"a plan is a collection of names, got the string 'last'; pass \['last'\]"),
    ],
    ids=["unknown", "unknown_kept", "two", "empty", "one_name"],
)
def test_plans_of_other_models_convert_nothing(model: Encoder, plan: Any, message: str) -> None:
    student = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        sf.convert_norms_(student, plan=plan)
    assert isinstance(student.blocks[0].norm, nn.LayerNorm)


def test_padding_does_not_count(model: Encoder) -> None:
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[:, 4:] = False
    data, spoiled = batches(), batches()
    for batch in spoiled:
        batch[:, 4:] = 1e3 * torch.randn(8, 2, C)
    results = [
        norm_costs(model, [{"x": batch, "attention_mask": mask} for batch in some])[0] for some in (data, spoiled)
    ]
    for left, right in zip(*results, strict=True):
        assert left.name == right.name
        figures = [[value for key, value in vars(cost).items() if key != "name"] for cost in (left, right)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_outputs_that_count_can_be_named(model: Encoder) -> None:
    pooled = norm_costs(model, batches(), outputs=lambda m, batch: m(batch).mean(1))[0]
    plain = norm_costs(model, batches())[0]
    assert all(a.alone < b.alone for a, b in zip(pooled, plain, strict=True))


def test_tied_norms_are_one(model: Encoder) -> None:
    tied = copy.deepcopy(model)
    tied.blocks[2].norm = tied.blocks[0].norm
    costs, plan = norm_costs(tied, batches(), budget=0.9)
    assert "blocks.2.norm" not in [cost.name for cost in costs]
    assert {"blocks.0.norm", "blocks.2.norm"} <= set(plan.take)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(model: Encoder, value: float) -> None:
    data = batches()
    data[1][0, 0, 0] = value
    with pytest.raises(ValueError, match=r"inputs or outputs of blocks.0.norm are not finite in batch 2"):
        sf.audit(model, data[0], batches=data)


def test_what_cannot_be_audited_with_data_is_said(model: Encoder) -> None:
    with pytest.raises(ValueError, match="there was no batch"):
        sf.audit(model, batches=[])
    with pytest.raises(ValueError, match=r"a budget needs data; pass batches"):
        sf.audit(model, batches()[0], budget=0.1)
    with pytest.raises(ValueError, match="needs example inputs, or batches"):
        sf.audit(model)
    with pytest.raises(ValueError, match="no LayerNorm or RMSNorm to convert"):
        sf.audit(nn.Linear(C, C), batches=batches())
    converted = copy.deepcopy(model)
    sf.convert_norms_(converted)
    with pytest.raises(ValueError, match="converted already; audit with data before convert_norms_"):
        sf.audit(converted, batches=batches())
    with pytest.raises(ValueError, match=r"no output .* to compare"):
        norm_costs(model, batches(), outputs=lambda m, batch: m(batch).argmax(-1))


def test_report_tells_where_the_error_is(report: Any) -> None:
    lines = report.cost_table().splitlines()
    assert lines[0].split() == ["norm", "R2", "alone", "plan", "error", "in"]
    assert len(lines) == 6
    assert "plan: convert" in lines[-1]
