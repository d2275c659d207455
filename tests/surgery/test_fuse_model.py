"""What fusing leaves of a model: its modes, dtypes, hooks and containers; and what it reports."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusing import FUSED, Net, X, fused, net, norm, outcomes, ready, reason
from slabformer.nn import Affine, PRepBN
from slabformer.surgery.fuse import Reason, fuse, fuse_
from tolerances import assert_close


def simple(dtype: torch.dtype = torch.float64) -> nn.Module:
    return ready(Net(lambda m, x: m.linear(m.norm(x)), norm=norm(), linear=nn.Linear(6, 3, bias=False)), dtype)


def test_fuse_leaves_the_model_alone_and_fuse_edits_it() -> None:
    model = simple()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result, _ = fuse(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model(X)
        report = fuse_(model, X)
        assert_close(model(X), expected, FUSED)
    assert report.num_folded == 1
    assert torch.equal(model.linear.weight, result.linear.weight)


def test_a_second_fuse_changes_nothing() -> None:
    model = net(
        lambda m, x: m.b(m.two(m.a(m.one(x)) + m.one(x))), one=norm(), a=nn.Linear(6, 6), two=norm(), b=nn.Linear(6, 2)
    )
    first, report = fused(model, X)
    second, again = fused(first, X)
    assert [(o.name, o.action, o.codes) for o in again] == [(o.name, o.action, o.codes) for o in report if not o.into]
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_model_that_is_all_folded_fuses_to_itself() -> None:
    first, _ = fused(simple(), X)
    _, report = fused(first, X)
    assert len(report) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_mode_and_requires_grad_survive(dtype: torch.dtype) -> None:
    model = simple(dtype).requires_grad_(False)
    result, report = fuse(model, X.to(dtype))
    assert report.num_folded == 1
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert not any(p.requires_grad for p in result.parameters())
    assert not any(module.training for module in result.modules())
    assert_close(result(X.to(dtype)), model(X.to(dtype)), 40 * torch.finfo(dtype).eps)


def test_hooks_survive_and_keep_what_they_look_at() -> None:
    model, seen = simple(), []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model.linear.register_forward_hook(lambda module, args, output: output * 2)
    result, report = fused(model, X)
    assert report["norm"].codes == (Reason.HOOKS,)
    seen.clear()
    model(X), result(X)
    assert_close(seen[1], seen[0], FUSED)


def test_hooks_on_neighbours_keep_what_they_look_at() -> None:
    model = simple()
    model.linear.register_forward_pre_hook(lambda module, args: None)
    assert "linear has forward pre-hooks, which see its input" in reason(model)
    model = net(lambda m, x: torch.tanh(m.norm(m.linear(x))), norm=norm(), linear=nn.Linear(6, 6))
    model.linear.register_forward_hook(lambda module, args, output: None)
    assert "linear has forward hooks, which see its output" in reason(model)


def test_a_model_that_cannot_be_traced_still_loses_its_norms() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.linear(m.norm(x))
        return y if y.sum().item() > 0 else -y

    model = net(forward, norm=PRepBN(6), linear=nn.Linear(6, 6))
    result, report = fused(model, X)
    assert isinstance(result.norm, Affine)
    assert report["norm"].reason.startswith("torch.export cannot trace the model (GuardOnDataDependentSymNode: ")
    assert "y.sum().item() > 0" in report["norm"].reason


def test_models_that_change_themselves_are_traced_on_a_copy() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.count += 1
        m.last = x
        return m.linear(m.norm(x))

    model = net(forward, norm=norm(), linear=nn.Linear(6, 3))
    model.calls, model.last = 0, None
    model.register_buffer("count", torch.zeros(()))
    fuse_(model, X)
    assert (model.calls, model.last, model.count.item()) == (0, None, 0)


def test_outputs_may_be_any_container() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits, self.rest = logits, {"hidden": [logits + 1]}

    model = net(lambda m, x: Output(m.linear(m.norm(x))), norm=norm(), linear=nn.Linear(6, 3))
    assert outcomes(model)[0][1] == "forward"


def test_keyword_arguments_are_passed_to_every_trace() -> None:
    model = net(
        lambda m, x=None, scale=1.0, flip=False: m.linear(m.norm(x).flip(1) if flip else x * scale),
        norm=norm(),
        linear=nn.Linear(6, 3),
    )
    _, report = fused(model, (), {"x": X, "flip": True})
    assert report["norm"].action == "forward"


def test_no_grad_and_autocast_regions_are_seen_through() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            y = m.norm(x)
        with torch.set_grad_enabled(False):
            return m.linear(y)

    assert outcomes(net(forward, norm=norm(), linear=nn.Linear(6, 3)))[0][1] == "forward"


def test_the_report_is_a_table_and_plain_data() -> None:
    model = net(lambda m, x: m.a(m.one(x)) + m.two(x), one=norm(), a=nn.Linear(6, 6), two=norm())
    _, report = fused(model, X)
    assert (report.num_folded, report.num_kept, len(report)) == (1, 1, 2)
    assert str(report["one"]) == "one folded forward into a"
    assert str(report["two"]).startswith("two kept as Affine: its output feeds an add")
    assert report.table().splitlines()[0] == "one  forward   a"
    data = report.to_dict()
    assert data["norms"][0] == {"name": "one", "action": "forward", "into": ["a"], "reason": "", "codes": []}
    assert (data["num_folded"], data["input_shapes"]) == (1, [[[2, 4, 6]]])
