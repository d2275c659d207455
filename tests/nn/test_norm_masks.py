"""Tokens that a mask leaves out: as if they were not there, whatever they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slabformer import RepBN, token_mask
from small_norms import MASK, C, trained
from tolerances import ALGEBRA, EXACT, assert_close


@pytest.mark.parametrize("mask", [None, MASK], ids=["no_mask", "mask"])
def test_gradients_match_finite_differences(mask: Tensor | None) -> None:
    norm = trained()
    norm.token_mask = mask
    x = torch.randn(2, 4, C, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, eta: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias, "eta": eta}, (x,))

    assert torch.autograd.gradcheck(run, (x, norm.weight, norm.bias, norm.eta))


def test_masked_tokens_count_as_dropped() -> None:
    norm, dropped = trained(), trained()
    x = torch.randn(2, 4, C, dtype=torch.float64, requires_grad=True)
    valid = x.detach()[MASK].requires_grad_()
    with token_mask(norm, MASK):
        y = norm(x)
    expected = dropped(valid)
    y[MASK].square().sum().backward()
    expected.square().sum().backward()
    assert_close(y[MASK], expected, ALGEBRA)
    assert_close(x.grad[MASK], valid.grad, ALGEBRA)
    assert not x.grad[~MASK].any()
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, dropped.get_parameter(name).grad, ALGEBRA)
    assert_close(norm.running_mean, dropped.running_mean, ALGEBRA)
    assert_close(norm.running_var, dropped.running_var, ALGEBRA)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_does_not_leak(garbage: float) -> None:
    norm, clean = trained(dtype=torch.float32), trained(dtype=torch.float32)
    x = torch.randn(2, 4, C)
    results = []
    for module, fill in ((norm, garbage), (clean, 0.0)):
        leaf = x.masked_fill(~MASK.unsqueeze(-1), fill).requires_grad_()
        with token_mask(module, MASK):
            y = module(leaf)
        y[MASK].square().sum().backward()
        results.append([y[MASK], leaf.grad, module.weight.grad, module.bias.grad, module.eta.grad])
        results[-1] += [module.running_mean, module.running_var]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, EXACT)


@pytest.mark.parametrize("num_valid", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "average"])
def test_fewer_than_two_valid_tokens_teach_nothing(num_valid: int, momentum: float | None) -> None:
    norm = RepBN(C, momentum=momentum)
    x = torch.randn(2, 4, C)
    norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask.view(-1)[:num_valid] = True
    with token_mask(norm, mask):
        assert norm(x)[mask].isfinite().all()
    for name, value in norm.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_all_true_mask_is_no_mask() -> None:
    masked, plain = trained(), trained()
    x = torch.randn(2, 4, C, dtype=torch.float64)
    with token_mask(masked, torch.ones(2, 4, dtype=torch.bool)):
        assert_close(masked(x), plain(x), ALGEBRA)
    assert_close(masked.running_var, plain.running_var, ALGEBRA)


def test_mask_of_another_shape_is_refused() -> None:
    norm = RepBN(C)
    with token_mask(norm, MASK), pytest.raises(ValueError, match="does not fit tokens"):
        norm(torch.zeros(2, 5, C))
