"""Norms behind sums and raw parameters: what each summand takes over, and why a norm there may stay."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusing import X, codes, fused, net, norm, outcomes, reason, tokens
from slabformer.surgery.fuse import Reason

MAPS = tokens(2, 6, 5, 5)


class Raw(nn.Module):
    """Parameters by name, of these shapes; a buffer for one whose name says so."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            if name.startswith("buffer"):
                self.register_buffer(name, torch.randn(shape), persistent=name != "buffer_unsaved")
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def raw(forward: Any, **shapes: tuple[int, ...]) -> nn.Module:
    """A model of one norm, linears, a convolution, and raw parameters."""
    linears = {name: nn.Linear(6, 6) for name in ("one", "two", "bare")}
    linears["bare"] = nn.Linear(6, 6, bias=False)
    return net(forward, norm=norm(), conv=nn.Conv2d(6, 6, 3, 2, bias=False), raw=Raw(**shapes), **linears)


def patches(m: Any, x: Tensor) -> Tensor:
    return m.conv(x).flatten(2).transpose(1, 2)


def with_class_token(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.raw.cls.expand(len(x), -1, -1), patches(m, x)], 1)


FOLDS = {
    "two layers": (lambda m, x: m.norm(m.one(x) + m.two(x.sin())), ("one", "two")),
    "three of them": (lambda m, x: m.norm(m.one(x) + (m.two(x.sin()) + m.bare(x.cos()))), ("one", "two", "bare")),
    "broadcast parameter": (lambda m, x: m.norm(m.one(x) + m.raw.pos), ("raw.pos", "one")),
    "in place": (lambda m, x: m.norm(m.one(x).add_(m.raw.pos)), ("raw.pos", "one")),
    "dropout between": (lambda m, x: m.norm(F.dropout(m.one(x) + m.raw.pos, 0.5, False)[:, 1:]), ("raw.pos", "one")),
    "slice of a table": (lambda m, x: m.norm(m.one(x) + m.raw.long[: x.shape[1]]), ("raw.long", "one")),
    "resampled table": (
        lambda m, x: m.norm(m.one(x) + F.interpolate(m.raw.long.mT[None], size=4, mode="linear").mT),
        ("raw.long", "one"),
    ),
    "split channels": (
        lambda m, x: m.norm(m.one(x) + torch.cat([m.raw.narrow, m.raw.other], -1)),
        ("raw.narrow", "raw.other", "one"),
    ),
    "channels in front": (lambda m, x: m.norm(m.one(x) + m.raw.turned.T), ("raw.turned", "one")),
    "two tokens of one parameter": (
        lambda m, x: m.norm(torch.cat([m.raw.long[:1], m.raw.long[3:]]).expand(len(x), -1, -1)),
        ("raw.long",),
    ),
    "bias added by hand": (lambda m, x: m.norm(F.linear(x, m.one.weight) + m.one.bias), ("one", "one.bias")),
    "bias that there is no room for": (lambda m, x: m.norm(x @ m.raw.square + m.raw.pos), ("raw.square", "raw.pos")),
    "zeros around one of them": (lambda m, x: m.norm(F.pad(m.one(x[:, 1:]), (0, 0, 0, 1)) + m.two(x)), ("one", "two")),
    "multiples": (lambda m, x: m.norm(3 * (m.one(x) / 2 + m.two(x.sin()) * 5)), ("one", "two")),
    "expanded, copied and changed in place": (
        lambda m, x: m.norm((m.one(x) + m.raw.pos)[:, :1].expand(x.shape).contiguous()).mul_(2),
        ("raw.pos", "one"),
    ),
    "changed in place": (lambda m, x: m.norm(m.one(x) + m.raw.pos).relu_(), ("raw.pos", "one")),
    "a saved buffer": (lambda m, x: m.norm(m.one(x) + m.raw.buffer), ("raw.buffer", "one")),
}
SHAPES = {
    "pos": (1, 4, 6),
    "long": (7, 6),
    "narrow": (1, 4, 2),
    "other": (1, 4, 4),
    "turned": (6, 4),
    "square": (6, 6),
    "buffer": (4, 6),
}


@pytest.mark.parametrize(("forward", "into"), FOLDS.values(), ids=FOLDS)
def test_a_norm_folds_into_all_that_is_summed(forward: Any, into: tuple[str, ...]) -> None:
    model = raw(lambda m, x: forward(m, x).tanh() + x.mean(), **SHAPES)
    _, report = fused(model, X)
    assert (report["norm"].action, set(report["norm"].into)) == ("backward", set(into))


def test_a_position_table_spares_the_patches_a_new_bias() -> None:
    model = raw(lambda m, x: m.norm(with_class_token(m, x) + m.raw.pos).tanh(), cls=(1, 1, 6), pos=(1, 5, 6))
    result, report = fused(model, MAPS)
    assert report["norm"].into == ("raw.cls", "raw.pos", "conv")
    assert result.conv.bias is None


def test_a_class_token_and_patches_without_positions_each_take_the_shift() -> None:
    model = raw(lambda m, x: m.norm(with_class_token(m, x)).tanh(), cls=(1, 1, 6))
    result, report = fused(model, MAPS)
    assert report["norm"].into == ("raw.cls", "conv")
    assert isinstance(result.conv.bias, nn.Parameter)


def test_positions_of_the_patches_alone_leave_the_class_token_to_itself() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.raw.cls.expand(len(x), -1, -1), patches(m, x) + m.raw.pos], 1)
        return m.norm(y).tanh()

    result, report = fused(raw(forward, cls=(1, 1, 6), pos=(1, 4, 6)), MAPS)
    assert report["norm"].into == ("raw.cls", "raw.pos", "conv")
    assert result.conv.bias is None


def test_a_bias_that_another_fold_created_takes_the_scale() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.bare(m.first(x)) + m.raw.pos).tanh()

    model = raw(forward, pos=(4, 6))
    model.first = norm().eval().double()
    result, report = fused(model, X)
    assert [(o.name, o.action) for o in report] == [("norm", "backward"), ("first", "forward")]
    assert isinstance(result.bare.bias, nn.Parameter)


def test_norms_before_and_behind_a_sum_both_fold() -> None:
    model = net(
        lambda m, x: m.behind(m.before(m.one(x)) + m.two(x.sin())).tanh(),
        before=norm(),
        behind=norm(),
        one=nn.Linear(6, 6),
        two=nn.Linear(6, 6),
    )
    assert [row[:3] for row in outcomes(model)] == [
        ("before", "backward", ("one",)),
        ("behind", "backward", ("one", "two")),
    ]


def test_positions_that_two_calls_of_a_norm_share_change_once() -> None:
    model = raw(lambda m, x: m.norm(m.one(x) + m.raw.pos).tanh() - m.norm(m.one(x.sin()) + m.raw.pos).cos(), pos=(4, 6))
    assert set(outcomes(model)[0][2]) == {"raw.pos", "one"}


def test_a_norm_over_maps_folds_into_a_sum_of_convolutions() -> None:
    model = net(
        lambda m, x: F.relu(m.norm(m.one(x) + m.two(x))),
        one=nn.Conv2d(6, 6, 3, padding=1),
        two=nn.Conv2d(6, 6, 1),
        norm=nn.BatchNorm2d(6),
    )
    assert outcomes(model, MAPS) == [("norm", "backward", ("one", "two"), "")]


def test_a_parameter_alone_takes_a_norm_over() -> None:
    model = raw(lambda m, x: x @ m.norm(m.raw.long).tanh().T, long=(7, 6))
    assert outcomes(model) == [("norm", "backward", ("raw.long",), "")]


def test_a_sum_must_fold_for_every_example() -> None:
    model = raw(lambda m, x: m.norm(m.one(x) + m.raw.long[: x.shape[1]]).tanh(), long=(7, 6))
    assert outcomes(model, [X, tokens(3, 5, 6)])[0][1] == "backward"
    model = raw(lambda m, x: m.norm(m.one(x) + (m.raw.long[:4] if x.shape[1] == 4 else x)).tanh(), long=(7, 6))
    assert Reason.COMES_FROM_INPUT in codes(model, [X, tokens(3, 5, 6)])


KEPT = {
    "an input": (lambda m, x: m.norm(m.one(x) + x), "its input comes from the model's own inputs"),
    "a number": (lambda m, x: m.norm(m.one(x) + 1), "its input comes from an add"),
    "weighted": (lambda m, x: m.norm(torch.add(m.one(x), m.two(x), alpha=2)), "its input comes from an add"),
    "an activation": (lambda m, x: m.norm(m.one(x) + m.two(x).tanh()), "its input comes from a tanh"),
    "twice the same": (lambda m, x: m.norm((y := m.one(x)) + y), "its input comes from an add"),
    "the same moved": (
        lambda m, x: m.norm((y := m.one(x)) + y.roll(1, 1)),
        "one has several parts in the sum in front of it",
    ),
    "summand read elsewhere": (
        lambda m, x: m.norm((y := m.one(x)) + m.two(x)) + y,
        "the output of one also feeds an add",
    ),
    "sum read elsewhere": (
        lambda m, x: m.norm(y := m.one(x) + m.two(x)) + y,
        "the output of an add in front of it also feeds an add",
    ),
    "parameter read elsewhere": (lambda m, x: m.norm(m.one(x) + m.raw.pos) + m.raw.pos, "raw.pos also feeds an add"),
    "part of it read elsewhere": (
        lambda m, x: m.norm(m.one(x) + m.raw.long[:4]) + m.raw.long[4:5],
        "raw.long also feeds an add",
    ),
    "broadcast channels": (
        lambda m, x: m.norm(m.one(x) + m.raw.lone),
        "what an add in front of it adds is broadcast over its channels",
    ),
    "scaled by a parameter": (lambda m, x: m.norm(m.one(x) + m.raw.pos * m.raw.lone), "its input comes from a mul"),
    "zeros around both": (
        lambda m, x: m.norm(F.pad(m.one(x), (0, 0, 0, 1)) + F.pad(m.two(x), (0, 0, 1, 0))),
        "seen from one, its output is padded",
    ),
    "zeros around the sum": (
        lambda m, x: m.norm(F.pad(m.one(x) + m.two(x), (0, 0, 0, 1))),
        "seen from an add in front of it, its output is padded",
    ),
    "multiplied twice": (
        lambda m, x: m.norm(2 * (y := m.raw.pos + m.one(x))) - m.norm(3 * y),
        "an add in front of it is multiplied by several numbers in front of it",
    ),
    "a buffer that is not saved": (
        lambda m, x: m.norm(m.one(x) + m.raw.buffer_unsaved),
        "raw.buffer_unsaved is a buffer",
    ),
    "expanded and changed in place": (
        lambda m, x: (y := m.norm(m.one(x).mean(1, True).expand(x.shape))).mul_(2) + y,
        "its output is changed in place, and elements of its input lie in one place",
    ),
    "a copy that is expanded": (
        lambda m, x: (y := m.norm((m.raw.vector * 1).expand(2, 4, 6).reshape(-1, 6))).mul_(2) + y,
        "its output is changed in place, and elements of its input lie in one place",
    ),
    "changed in place": (
        lambda m, x: m.norm(m.raw.buffer).mul_(2) + m.one(x),
        "the forward may change raw.buffer in place",
    ),
    "changed in place behind a dropout": (
        lambda m, x: m.norm(F.dropout(m.raw.buffer, 0.5, False)).mul_(2) + m.one(x),
        "the forward may change raw.buffer in place",
    ),
}


@pytest.mark.parametrize(("forward", "why"), KEPT.values(), ids=KEPT)
def test_a_sum_that_cannot_take_a_norm_over_keeps_it(forward: Any, why: str) -> None:
    shapes = {**SHAPES, "lone": (4, 1), "vector": (6,), "buffer_unsaved": (4, 6)}
    assert why in reason(raw(lambda m, x: forward(m, x).tanh(), **shapes))


def test_channels_of_a_summand_that_the_norm_sees_once_and_misses_once_keep_it() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.narrow(x)
        wide = torch.cat([y, m.two(x)[..., :3]], -1) + m.one(x)
        return wide[..., :3].tanh(), m.norm(wide[..., 3:]).tanh(), m.norm(y + m.other(x.sin())).tanh()

    linears = {"one": nn.Linear(6, 6), "two": nn.Linear(6, 6), "narrow": nn.Linear(6, 3), "other": nn.Linear(6, 3)}
    for order in (1, -1):
        model = net(lambda m, x, order=order: forward(m, x)[::order], norm=norm(3), **linears)
        assert Reason.CHANNELS_MIXED in codes(model)


def test_sums_that_share_their_summands_over_and_over_are_refused_at_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        for _ in range(20):
            x = (x + x.roll(1, 1)) / 2
        return m.norm(x).tanh()

    assert Reason.SEVERAL_PARTS in codes(raw(forward))


def test_integers_keep_the_norm() -> None:
    model = raw(lambda m, x: m.norm(m.one(x) + m.raw.buffer.to(x.dtype)).tanh(), buffer=(4, 6))
    model.raw.buffer = torch.arange(24).view(4, 6)
    assert Reason.NOT_FLOAT in codes(model)


def test_a_tied_parameter_keeps_the_norm_unless_it_is_untied() -> None:
    model = raw(lambda m, x: m.norm(m.one(x) + m.raw.pos).tanh() + m.other.pos, pos=(4, 6))
    model.other = Raw(pos=(4, 6)).eval()
    model.other.pos = model.raw.pos
    assert Reason.TIED in codes(model)
    result, report = fused(model, X, untie=True)
    assert report["norm"].into == ("raw.pos", "one")
    assert torch.equal(result.other.pos, model.raw.pos)
