"""PRepBN from phase to phase: what it computes, what gets a gradient, what a state dict brings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slabformer import PRepBN, blended
from small_norms import C, trained
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close


def loud(dim: int) -> nn.LayerNorm:
    """A LayerNorm whose output is NaN, to show whether it is computed."""
    norm = nn.LayerNorm(dim)
    nn.init.constant_(norm.weight, float("nan"))
    return norm


def test_done_phase_does_not_compute_the_old_norm() -> None:
    norm = PRepBN(C, norm=loud(C))
    norm.set_gamma(0)
    x = torch.randn(2, 3, C, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert not norm.norm.weight.grad.any()
    norm.set_gamma(0.5)
    assert norm(x).isnan().all()


def test_eval_is_repbn_whatever_gamma() -> None:
    norm = PRepBN(C, norm=loud(C)).eval()
    x = torch.randn(2, 3, C)
    for gamma in (1.0, 0.5, 0.0):
        norm.set_gamma(gamma)
        assert_close(norm(x), norm.rep(x), EXACT)


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_blended_eval_is_the_weighted_sum_of_both(gamma: float) -> None:
    norm = PRepBN(C, norm=nn.LayerNorm(C)).eval()
    norm.rep.load_state_dict(trained(dtype=torch.float32).state_dict())
    norm.set_gamma(gamma)
    x = torch.randn(2, 3, C)
    before = copy.deepcopy(norm.state_dict())
    with blended(norm):
        assert_close(norm(x), gamma * norm.norm(x) + (1 - gamma) * norm.rep(x), FLOAT32)
    assert_close(norm(x), norm.rep(x), EXACT)
    for name, value in norm.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_fading_gradients_are_those_of_the_weighted_sum() -> None:
    norm, reference = PRepBN(C, dtype=torch.float64), PRepBN(C, dtype=torch.float64)
    norm.double().set_gamma(0.3)
    x = torch.randn(2, 3, C, dtype=torch.float64, requires_grad=True)
    reference_x = x.detach().clone().requires_grad_()
    norm(x).pow(3).sum().backward()
    (norm.gamma * reference.norm(reference_x) + (1 - norm.gamma) * reference.rep(reference_x)).pow(3).sum().backward()
    assert_close(x.grad, reference_x.grad, ALGEBRA)
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, reference.get_parameter(name).grad, ALGEBRA)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0], ids=["warm", "fading", "done"])
def test_output_may_be_edited_in_place(gamma: float) -> None:
    norm, reference = PRepBN(C), PRepBN(C)
    norm.set_gamma(gamma)
    reference.set_gamma(gamma)
    x = torch.randn(2, 3, C)
    norm(x).relu_().sum().backward()
    reference(x).relu().sum().backward()
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, reference.get_parameter(name).grad, EXACT)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0], ids=["warm", "fading", "done"])
def test_every_parameter_gets_a_gradient_in_every_phase(gamma: float) -> None:
    norm = PRepBN(C)
    norm.set_gamma(gamma)
    norm(torch.randn(2, 3, C)).sum().backward()
    assert all(parameter.grad is not None for parameter in norm.parameters())


def test_gamma_may_be_written_between_forward_and_backward() -> None:
    norm, reference = PRepBN(C), PRepBN(C)
    x = torch.randn(2, 3, C)
    for module in (norm, reference):
        module.set_gamma(0.5)
    y = norm(x)
    norm.set_gamma(0.25)
    y.square().sum().backward()
    reference(x).square().sum().backward()
    assert_close(norm.norm.weight.grad, reference.norm.weight.grad, EXACT)


@pytest.mark.parametrize(("gamma", "phase"), [(1.0, "warm"), (0.999, "fading"), (1e-7, "fading"), (0.0, "done")])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_phase_is_derived_when_a_state_dict_is_loaded(gamma: float, phase: str, assign: bool) -> None:
    source, target = nn.Sequential(PRepBN(C)), nn.Sequential(PRepBN(C))
    source[0].set_gamma(gamma)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target[0].phase == phase
    assert target[0].gamma == source[0].gamma


def test_autocast_keeps_the_input_dtype_and_float32_statistics() -> None:
    norm = PRepBN(C)
    norm.set_gamma(0.5)
    x = (100 + torch.randn(4, 197, C)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm.rep.running_mean.dtype == torch.float32
    assert_close(norm.rep.running_mean, 0.1 * x.double().mean((0, 1)), FLOAT32)
