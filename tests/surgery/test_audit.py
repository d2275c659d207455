"""An audit says what fuse will do, before there is anything to fuse."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusing import Net, ready, tokens
from slabformer.surgery.audit import audit, time_norms
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import Reason, fuse

X = tokens(2, 4, 6).float()


def forward(m: Any, x: Tensor) -> Tensor:
    x = m.embed(x)
    x = x + m.proj(F.pad(m.padded(x), (0, 0, 0, 1))[:, :4])
    return m.head(m.last(x)) + m.post(x)


def build(device: str = "cpu") -> nn.Module:
    names = ("embed", "proj", "head")
    with torch.device(device):
        linears = {name: nn.Linear(6, 6) for name in names}
        return Net(forward, **linears, **{name: nn.LayerNorm(6) for name in ("padded", "last", "post")})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_audit_is_what_fuse_reports_after_training(device: str) -> None:
    model = build()
    convert_norms_(model)
    _, expected = fuse(ready(model, torch.float32), X)
    found = audit(build(device), X.to(device))
    assert found.outcomes == expected.outcomes
    assert [o.action for o in found] == ["forward", "forward", "kept"]


def test_a_layer_scale_that_is_still_next_to_zero_does_not_count() -> None:
    def scaled(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return m.head(x + m.gamma * m.proj(F.pad(m.padded(x), (0, 0, 0, 1))[:, :4]))

    model = build()
    model.body, model.gamma = scaled, nn.Parameter(torch.full((6,), 1e-6))
    assert audit(model, X)["padded"].into == ("proj", "embed")


def test_an_audit_changes_nothing() -> None:
    model = build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    audit(model, X)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in modules)


def test_norms_that_a_model_has_already_are_audited() -> None:
    model = Net(lambda m, x: m.linear(m.norm(x.mT).mT), norm=nn.BatchNorm1d(6), linear=nn.Linear(6, 3))
    assert audit(model.eval(), X)["norm"].into == ("linear",)


def test_a_model_that_cannot_be_traced_says_so() -> None:
    def branch(m: Any, x: Tensor) -> Tensor:
        y = m.last(x)
        return m.head(y) if y.sum().item() > 0 else y

    report = audit(Net(branch, last=nn.LayerNorm(6), head=nn.Linear(6, 6)), X)
    assert report["last"].codes == (Reason.NOT_TRACEABLE,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_looks_like_a_norm_and_stays_is_listed(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.LayerNorm((4, 6)), nn.LayerNorm(6), nn.Linear(6, 6))
    report = audit(model, X.to(device))
    assert [o.action for o in report] == ["forward"]
    assert [(norm.name, norm.kind) for norm in report.left] == [("0", "LayerNorm")]
    assert report.left[0].code == Reason.SEVERAL_AXES
    assert "1 that look like norms left as they are" in report.summary()
    assert "0  left      LayerNorm: it normalises over several axes" in report.table()
    assert report.to_dict()["left"] == [
        {"name": "0", "kind": "LayerNorm", "reason": report.left[0].reason, "code": "several-axes"}
    ]
    alone = audit(model[:1], X.to(device))
    assert (len(alone), len(alone.left)) == (0, 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_norms_in_the_code_of_other_modules_are_listed(device: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.query = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(self.query(self.norm(x)), (6,))

    with torch.device(device):
        model = nn.Sequential(Attention(), nn.Linear(6, 6))
    report = audit(model, X.to(device))
    assert [o.name for o in report] == ["0.norm"]
    assert report.left == (("0", "Attention", "its code calls rms_norm; a norm must be a module", Reason.IN_CODE),)


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="no LayerNorm or RMSNorm to convert"):
        audit(nn.Sequential(nn.Linear(6, 6)), X)


def test_the_time_of_norms_is_a_share_of_the_forward() -> None:
    taken = time_norms(build(), X)
    assert 0 < taken.norms < taken.total
    assert 0 < taken.share < 1
    with pytest.raises(ValueError, match="norms are timed on a CPU"):
        time_norms(build("meta"), X.to("meta"))
