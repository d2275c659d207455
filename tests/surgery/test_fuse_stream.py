"""Norms in front of zero padding: the residual stream is moved, so that a fold holds whatever is padded."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusing import assert_same_outputs, fused, net, norm, tokens
from slabformer.nn import Affine

UNPADDED, PADDED = (2, 6, 3, 6), [(2, 6, 3, 6), (2, 4, 6, 6), (1, 5, 5, 6)]
LINEARS = ("embed", "qkv", "proj", "up", "down", "head")


def windows(x: Tensor) -> Tensor:
    """Windows of 3x3 over a padded map, cut back to its size afterwards by :func:`merged`."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % 3, 0, -x.shape[1] % 3)).roll((-1, -1), (1, 2))
    x = x.unflatten(2, (-1, 3)).unflatten(1, (-1, 3)).transpose(2, 3)
    return x.flatten(3, 4)


def merged(x: Tensor, like: Tensor) -> Tensor:
    x = x.unflatten(3, (3, 3)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x.roll((1, 1), (1, 2))[:, : like.shape[1], : like.shape[2]]


def attend(m: Any, x: Tensor) -> Tensor:
    return merged(m.proj(m.qkv(windows(m.norm(x))).softmax(-2)), x)


def children(**others: nn.Module) -> dict[str, nn.Module]:
    return {"norm": norm(), **{name: nn.Linear(6, 6) for name in LINEARS}, **others}


def block(m: Any, x: Tensor, stem: Any = None) -> Tensor:
    x = (stem or m.embed)(x)
    x = x + attend(m, x)
    return m.head(x + m.down(F.gelu(m.up(x)))).tanh()


def assert_folds_at_every_size(model: nn.Module, *into: str) -> None:
    result, report = fused(model, tokens(*UNPADDED))
    assert (report["norm"].action, set(report["norm"].into)) == ("forward", set(into))
    for size in PADDED:
        assert_same_outputs(model, result, (tokens(*size, seed=3),))


def refusal(model: nn.Module) -> str:
    result, report = fused(model, tokens(*UNPADDED))
    assert report["norm"].action == "kept"
    for size in PADDED:
        assert_same_outputs(model, result, (tokens(*size, seed=3),))
    return report["norm"].reason


def test_a_norm_before_padded_windows_folds_by_moving_the_stream() -> None:
    assert_folds_at_every_size(net(block, **children()), "qkv", "embed", "proj")


def test_new_biases_take_the_move() -> None:
    bare = {name: nn.Linear(6, 6, bias=False) for name in LINEARS}
    assert_folds_at_every_size(net(block, **children(**bare)), "qkv", "embed", "proj")


def test_a_stream_that_is_a_sum_is_moved_by_what_was_added_last() -> None:
    def stem(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return x + m.last(F.gelu(x))

    model = net(lambda m, x: block(m, x, lambda y: stem(m, y)), **children(last=nn.Linear(6, 6)))
    assert_folds_at_every_size(model, "qkv", "last", "proj")


def test_a_stream_is_followed_through_rearrangements() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.embed(x.flatten(1, 2))
        x = y.unflatten(1, x.shape[1:3])
        return (y + attend(m, x).flatten(1, 2)).tanh()

    assert_folds_at_every_size(net(forward, **children()), "qkv", "embed", "proj")


def test_other_readers_of_the_stream_take_the_move_away() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return (m.up(m.other(x)) + x + attend(m, x) + m.down(x)).tanh()

    model = net(forward, **children(other=Affine(6)))
    result, report = fused(model, tokens(*UNPADDED))
    assert report.num_kept == 0
    assert set(report["norm"].into) == {"qkv", "embed", "up", "down"}
    for size in PADDED:
        assert_same_outputs(model, result, (tokens(*size, seed=3),))


def test_a_norm_in_front_moves_the_stream() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(F.gelu(x))
        return (x + attend(m, x)).tanh()

    model = net(forward, **children(first=norm()))
    result, report = fused(model, tokens(*UNPADDED))
    assert (report["norm"].into, report["first"].action) == (("qkv", "first", "proj"), "kept")
    assert_same_outputs(model, result, (tokens(*PADDED[-1]),))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_norm_before_a_padded_convolution_folds_by_moving_the_stream(groups: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.down(F.gelu(m.up(x)))
        return m.conv(m.norm(x).permute(0, 3, 1, 2)).tanh()

    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups)
    model = net(forward, **children(conv=conv))
    result, report = fused(model, tokens(*UNPADDED))
    assert report["norm"].into == ("conv", "down")
    assert_same_outputs(model, result, (tokens(*PADDED[-1]),))


def layer_scale(shape: tuple[int, ...]) -> nn.Module:
    """A linear whose output is scaled by a parameter of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        y = merged(m.proj(m.qkv(windows(m.norm(x))).softmax(-2)), x)
        x = x + y * m.scale.gamma.view(-1)
        return m.head(x).tanh()

    scale = nn.Module()
    scale.gamma = nn.Parameter(torch.rand(shape) + 0.5)
    return net(forward, **children(scale=scale))


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1)], ids=str)
def test_a_branch_behind_layer_scale_moves_the_stream(shape: tuple[int, ...]) -> None:
    assert_folds_at_every_size(layer_scale(shape), "qkv", "embed", "proj")


def test_a_layer_scale_near_zero_keeps_the_norm() -> None:
    model = layer_scale((6,))
    with torch.no_grad():
        model.scale.gamma[1] = 1e-6
    assert "scale.gamma is too near 0 for proj to move the stream" in refusal(model)


REFUSED = {
    "output": (
        lambda m, x: ((x := m.embed(x)) + attend(m, x), x),
        "the stream in front of it also feeds the model's output",
    ),
    "activation": (
        lambda m, x: (x := m.embed(x)) + attend(m, x) + F.gelu(x),
        "the stream in front of it also feeds a gelu",
    ),
    "nothing to move it": (
        lambda m, x: x + attend(m, x),
        "the stream in front of it comes from the model's own inputs",
    ),
    "no Linear in the branch": (
        lambda m, x: (x := m.embed(x)) + merged(m.qkv(windows(m.norm(x))).softmax(-2), x),
        "the stream in front of it comes from a softmax",
    ),
    "branch read elsewhere": (
        lambda m, x: ((x := m.embed(x)) + (y := attend(m, x))).tanh() + y,
        "what is added to the stream in front of it also feeds an add",
    ),
    "weighted sum": (
        lambda m, x: torch.add(x := m.embed(x), attend(m, x), alpha=2),
        "the stream in front of it also feeds an add",
    ),
    "other padding": (
        lambda m, x: m.embed(F.pad(m.norm(m.embed(x)), (0, 0, 0, 1), value=2.0)),
        "its output is padded with something else than zeros",
    ),
    "called twice": (
        lambda m, x: (x := m.embed(x)) + attend(m, x) + merged(m.qkv(windows(m.norm(x.sin()))), x),
        "it is called more than once",
    ),
    "broadcast branch": (
        lambda m, x: (x := m.embed(x)) + m.proj(m.qkv(F.pad(m.norm(x), (0, 0, 0, 1))).mean((1, 2), keepdim=True)),
        "what is added to the stream in front of it is broadcast",
    ),
}


@pytest.mark.parametrize(("forward", "why"), REFUSED.values(), ids=REFUSED)
def test_a_stream_that_cannot_be_moved_keeps_the_norm(forward: Any, why: str) -> None:
    assert why in refusal(net(forward, **children()))


def test_a_channel_that_the_norm_all_but_erases_keeps_it() -> None:
    model = net(block, **children(norm=Affine(6)))
    with torch.no_grad():
        model.norm.weight[4] = 1e-4
    assert "its scale of channel 4 is too near 0 to move the stream in front of it" in refusal(model)
