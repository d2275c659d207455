"""What making an attention linear costs is what happens when it is done; the plan takes what the budget allows."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
from slabformer.surgery.audit_attention import AttentionAudit
from slabformer.surgery.conversion_plan import ConversionPlan

timm = pytest.importorskip("timm", reason="its models are the subjects")


def vit(**changes: Any) -> nn.Module:
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**settings | changes).eval()
    for name, parameter in model.named_parameters():
        if "attn" in name:  # attention that looks at something
            parameter.data.mul_(4.0)
    return model


def images(size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, size, size, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def report() -> AttentionAudit:
    return sf.audit_attention(vit(), images())


@torch.no_grad()
def lost(model: nn.Module, teacher: nn.Module) -> float:
    cosines = [F.cosine_similarity(model(x).double(), teacher(x).double()) for x in images()]
    return float(1 - torch.cat(cosines).mean())


def test_alone_is_what_converting_one_alone_takes(report: AttentionAudit) -> None:
    assert [cost.name for cost in report.costs] == [f"blocks.{i}.attn" for i in range(3)]
    for cost in report.costs:
        model, teacher = vit(), vit()
        sf.convert_attention_(model, plan=[cost.name])
        errors = sf.align_attention_(model, teacher, images(), steps=0)
        assert cost.error == pytest.approx(errors[cost.name])
        assert cost.alone == pytest.approx(lost(model, teacher), rel=1e-4)
        assert cost.alone > 0


def test_operations_are_those_at_the_size_of_the_images(report: AttentionAudit) -> None:
    N, C, D = 65, 32, 16
    for cost in report.costs:
        assert cost.products == 2 * N * N * C
        assert cost.saved == cost.products - 2 * N * D * C - 2 * N * C - 64 * 25 * C
    assert report.summary().endswith(
        f"it saves {sum(c.saved for c in report.costs) / 1e6:.1f} of 0.8 million "
        "multiply-adds of attention's products for each sample"
    )


def test_a_budget_picks_the_cheapest_and_convert_takes_the_plan(report: AttentionAudit) -> None:
    every = sf.audit_attention(vit(), images(), budget=0.999999).plan
    assert len(every.take) == 3
    budget = every.cost * 0.9
    plan = sf.audit_attention(vit(), images(), budget=budget).plan
    assert 0 < plan.cost <= budget
    assert 0 < len(plan.take) < 3
    alone = {cost.name: cost.alone for cost in report.costs}
    assert max(alone[name] for name in plan.take) <= min(alone[name] for name in plan.keep)
    model, teacher = vit(), vit()
    again = ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert sf.convert_attention_(model, plan=again) == list(plan.take)
    sf.align_attention_(model, teacher, images(), steps=0)
    assert plan.cost == pytest.approx(lost(model, teacher), rel=1e-4)


def test_plans_go_to_what_they_are_of(report: AttentionAudit) -> None:
    with pytest.raises(ValueError, match="the plan is of attentions: give it to convert_attention_"):
        sf.convert_norms_(vit(), plan=report.plan)
    norms = sf.audit(vit(), batches=images()).plan
    with pytest.raises(ValueError, match="the plan is of norms: give it to convert_norms_"):
        sf.convert_attention_(vit(), plan=norms)
    with pytest.raises(ValueError, match="it must be of norms or attentions, got 'blocks'"):
        ConversionPlan.from_dict(norms.to_dict() | {"of": "blocks"})


def test_an_audit_changes_nothing() -> None:
    model = vit().train()
    before, modules = copy.deepcopy(model.state_dict()), [*model.modules()]
    sf.audit_attention(model, images())
    assert [*model.modules()] == modules
    assert all(module.training for module in modules)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_attention_over_few_tokens_is_never_planned() -> None:
    model, small = vit(img_size=16), [x[:, :, :16, :16] for x in images()]
    report = sf.audit_attention(model, small)
    assert all(cost.saved < 0 for cost in report.costs)
    assert report.plan.take == ()
    assert "plan: convert 0 of 3 attentions" in report.cost_table()
    with pytest.raises(ValueError, match="the plan takes no attention"):
        sf.convert_attention_(model, plan=report.plan)


def test_what_cannot_be_audited_is_said() -> None:
    with pytest.raises(ValueError, match="no softmax attention of Sequential to convert"):
        sf.audit_attention(nn.Sequential(nn.Linear(3, 3)), images())
    with pytest.raises(ValueError, match="no attention can go within a budget of 1e-09: losing blocks"):
        sf.audit_attention(vit(class_token=False, global_pool="avg"), images(), budget=1e-9)
    with pytest.raises(ValueError, match="there was no batch"):
        sf.audit_attention(vit(), [])
    with pytest.raises(ValueError, match=r"outputs of the teacher's blocks.0.attn are not finite"):
        sf.audit_attention(vit(), [torch.full((1, 3, 32, 32), float("nan"))])


def test_one_attention_in_two_places_stays_one() -> None:
    model = vit()
    model.blocks[2].attn = model.blocks[0].attn
    assert sf.convert_attention_(model) == [f"blocks.{i}.attn" for i in range(3)]
    assert model.blocks[2].attn is model.blocks[0].attn
