"""RepBN is BatchNorm with a skip: values, gradients and statistics, in every shape, dtype and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slabformer import PRepBN, RepBN
from small_norms import C, trained
from tolerances import ALGEBRA, FLOAT32, assert_close

LAYOUTS = {
    "one_token": ((4, 1, C), -1),
    "7_tokens": ((2, 7, C), -1),
    "197_tokens": ((2, 197, C), -1),
    "no_token_axis": ((16, C), -1),
    "map_channels_last_axis": ((2, 3, 5, C), -1),
    "map_channels_first": ((2, C, 3, 5), 1),
    "vectors_as_maps": ((16, C), 1),
}


def reference(norm: RepBN, x: Tensor) -> tuple[Tensor, nn.BatchNorm1d, Tensor]:
    """Output of ``nn.BatchNorm1d + eta * x`` in float64 on tokens ``(*, C)``, the BatchNorm, and its ``eta``."""
    bn = nn.BatchNorm1d(x.shape[-1], norm.eps, norm.momentum, dtype=torch.float64).train(norm.training)
    bn.load_state_dict({name: value.double() for name, value in norm.state_dict().items() if name != "eta"})
    eta = norm.eta.detach().double().requires_grad_()
    return bn(x.flatten(0, -2)).view(x.shape) + eta * x, bn, eta


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_repbn_is_batchnorm_plus_skip(shape: tuple[int, ...], channel_dim: int, training: bool) -> None:
    norm = trained(channel_dim).train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x_copy = x.detach().clone().requires_grad_()
    expected, bn, eta = reference(norm, x_copy.movedim(channel_dim, -1))
    expected = expected.movedim(-1, channel_dim)
    actual = norm(x)
    grad = torch.randn_like(expected)
    actual.backward(grad)
    expected.backward(grad)
    assert_close(actual, expected, ALGEBRA)
    for ours, theirs in ((x, x_copy), (norm.weight, bn.weight), (norm.bias, bn.bias), (norm.eta, eta)):
        assert_close(ours.grad, theirs.grad, ALGEBRA)
    assert_close(norm.running_mean, bn.running_mean, ALGEBRA)
    assert_close(norm.running_var, bn.running_var, ALGEBRA)
    assert norm.num_batches_tracked == bn.num_batches_tracked == int(training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["as_input", "float32"])
def test_shorter_dtypes_lose_no_more_than_their_own_rounding(
    dtype: torch.dtype, parameters: str, training: bool
) -> None:
    norm = trained(dtype=dtype if parameters == "as_input" else torch.float32).train(training)
    x = (3 + torch.randn(4, 197, C)).to(dtype).requires_grad_()
    x_copy = x.detach().double().requires_grad_()
    expected, bn, eta = reference(norm, x_copy)
    actual = norm(x)
    grad = torch.randn_like(expected).to(dtype)
    actual.backward(grad)
    expected.backward(grad.double())
    tolerance = 8 * torch.finfo(dtype).eps  # one rounding of values up to some 5 times the root mean square
    assert actual.dtype == x.dtype
    assert x.grad.dtype == dtype
    pairs = [(actual, expected), (x.grad, x_copy.grad), (norm.weight.grad, bn.weight.grad), (norm.eta.grad, eta.grad)]
    for ours, theirs in pairs:
        assert_close(ours, theirs, max(tolerance, FLOAT32))
    assert_close(norm.running_mean, bn.running_mean, max(tolerance, FLOAT32))
    assert_close(norm.running_var, bn.running_var, max(tolerance, FLOAT32))


def test_half_precision_eval_does_not_round_scale_and_shift() -> None:
    norm = RepBN(C, eta=0.0, dtype=torch.bfloat16).eval()
    norm.running_mean.fill_(10)
    norm.running_var.fill_(0.125)
    x = (10 + 0.3 * torch.randn(4, 7, C)).bfloat16()
    assert_close(norm(x), (x.double() - 10) / (0.125 + norm.eps) ** 0.5, 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (1e4, 0.1), (-3.0, 1e-3)])
def test_large_mean_costs_no_more_digits_than_in_batchnorm(mean: float, std: float) -> None:
    torch.manual_seed(0)
    x = mean + std * torch.randn(16, 197, C)
    norm, bn = RepBN(C, eta=0.0), nn.BatchNorm1d(C)
    tokens = x.double().flatten(0, 1)
    exact = (tokens - tokens.mean(0)) / (tokens.var(0, unbiased=False) + norm.eps).sqrt()
    ours = (norm(x).flatten(0, 1) - exact).abs().max()
    theirs = (bn(x.flatten(0, 1)) - exact).abs().max()
    assert ours <= max(theirs, torch.tensor(1e-5))
    assert_close(norm.running_var, 0.9 + 0.1 * tokens.var(0), 1e-6)
    assert_close(norm.running_mean, 0.1 * tokens.mean(0), 1e-6)


@pytest.mark.parametrize(
    ("layout", "channel_dim"),
    [
        (lambda: torch.randn(5, C, 2, dtype=torch.float64).transpose(1, 2), -1),
        (lambda: torch.randn(4, 10, 2 * C, dtype=torch.float64)[:, ::2, ::2], -1),
        (lambda: torch.randn(2, C, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last), 1),
        (lambda: torch.randn(2, 1, C, dtype=torch.float64).expand(2, 7, C), -1),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_memory_layout_changes_nothing(layout: Callable[[], Tensor], channel_dim: int, training: bool) -> None:
    outputs, x = [], layout()
    for tokens in (x, x.clone(memory_format=torch.contiguous_format)):
        norm = trained(channel_dim).train(training)
        tokens = tokens.detach().requires_grad_()
        y = norm(tokens)
        y.square().sum().backward()
        outputs.append([y, tokens.grad, norm.weight.grad, norm.running_var])
    for ours, theirs in zip(*outputs, strict=True):
        assert_close(ours, theirs, ALGEBRA)


def test_channels_last_maps_stay_channels_last() -> None:
    x = torch.randn(2, C, 4, 3).to(memory_format=torch.channels_last)
    assert trained(1, torch.float32)(x).is_contiguous(memory_format=torch.channels_last)


def test_one_token_is_enough_in_eval() -> None:
    assert RepBN(C).eval()(torch.zeros(1, 1, C)).shape == (1, 1, C)


def test_momentum_none_averages_all_batches() -> None:
    norm, bn = RepBN(C, momentum=None, dtype=torch.float64), nn.BatchNorm1d(C, momentum=None, dtype=torch.float64)
    for batch in torch.randn(5, 8, C, dtype=torch.float64):
        norm(batch)
        bn(batch)
    assert_close(norm.running_mean, bn.running_mean, ALGEBRA)
    assert_close(norm.running_var, bn.running_var, ALGEBRA)


def test_warm_statistics_average_first_then_follow_momentum() -> None:
    norm = RepBN(C, momentum=0.25, dtype=torch.float64)
    norm.warm_statistics = True
    batches = 5 + torch.randn(6, 8, C, dtype=torch.float64)
    means = batches.mean(1)
    for batch in batches[:4]:
        norm(batch)
    assert_close(norm.running_mean, means[:4].mean(0), ALGEBRA)  # nothing left of the start at 0
    for batch in batches[4:]:
        norm(batch)
    assert_close(norm.running_mean, 0.75 * (0.75 * means[:4].mean(0) + 0.25 * means[4]) + 0.25 * means[5], ALGEBRA)


@pytest.mark.parametrize(("given", "eta"), [({}, 0), ({"eta": "published"}, 1), ({"eta": 0.3}, 0.3)])
def test_skip_starts_closed_unless_the_published_start_is_asked_for(given: dict[str, Any], eta: float) -> None:
    for norm in (RepBN(C, **given), PRepBN(C, **given).rep):
        assert norm.eta.item() == pytest.approx(eta)
        nn.init.constant_(norm.eta, 7)
        norm.reset_parameters()
        assert norm.eta.item() == pytest.approx(eta)


def test_start_of_the_skip_is_a_number_or_a_known_name() -> None:
    with pytest.raises(ValueError, match="eta must be a finite number or 'published', got 'publishd'"):
        RepBN(C, eta="publishd")


def test_deep_stream_stays_bounded_from_the_start() -> None:
    torch.manual_seed(0)
    norms = nn.ModuleList(RepBN(C) for _ in range(24))
    x = y = torch.randn(64, C)
    for norm in norms:
        y = y + norm(y)
    assert y.std() < 30 * x.std()  # 1e7 times with the published start
