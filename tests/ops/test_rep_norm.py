from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slabformer.ops.moments import batch_moments
from slabformer.ops.rep_norm import keep_in_graph, rep_norm
from tolerances import ALGEBRA, EXACT, assert_close

EPS = 1e-5


def by_autograd(x: Tensor, weight: Tensor, bias: Tensor, eta: Tensor, mask: Tensor | None) -> Tensor:
    """The slow, obvious reference."""
    valid = x.flatten(0, -2) if mask is None else x[mask]
    mean, var = valid.mean(0), valid.var(0, unbiased=False)
    return weight * (x - mean) / (var + EPS).sqrt() + bias + eta * x


@pytest.mark.parametrize("shape", [(4, 1, 3), (2, 7, 3), (2, 197, 3), (2, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
def test_equals_reference_in_outputs_and_gradients(shape: tuple[int, ...], masked: bool) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(shape[:-1]) > 0.3).index_fill_(0, torch.tensor([0]), True) if masked else None
    results = []
    values = [torch.randn(s, dtype=torch.float64) for s in (shape, (3,), (3,), (1,))]
    grad = torch.randn(shape, dtype=torch.float64)
    for function in (lambda *a: rep_norm(*a, batch_moments(a[0].detach(), mask), EPS, mask), by_autograd):
        leaves = [value.clone().requires_grad_() for value in values]
        y = function(*leaves) if function is not by_autograd else by_autograd(*leaves, mask)
        y.backward(grad)
        results.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, ALGEBRA)


def test_constant_channel_has_finite_output_and_gradient() -> None:
    x = torch.full((4, 3), 2.0, requires_grad=True)
    one = torch.ones(3, requires_grad=True)
    y = rep_norm(x, one, one, torch.ones(1), batch_moments(x.detach()), EPS)
    y.square().sum().backward()
    assert_close(y, torch.full((4, 3), 3.0), EXACT)
    assert x.grad.isfinite().all()


def test_second_derivative_is_refused_instead_of_wrong() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    one = torch.ones(3)
    y = rep_norm(x, one, one, torch.ones(1), batch_moments(x.detach()), EPS)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_keep_in_graph_gives_zeros_to_the_unused() -> None:
    x, unused = torch.randn(3, requires_grad=True), torch.full((2,), torch.nan, requires_grad=True)
    y = keep_in_graph(x, unused)
    y.mul_(2).sum().backward()
    assert_close(x.grad, torch.full((3,), 2.0), EXACT)
    assert_close(unused.grad, torch.zeros(2), EXACT)


def test_keep_in_graph_is_nothing_without_gradients() -> None:
    x = torch.randn(3)
    with torch.no_grad():
        assert keep_in_graph(x, torch.ones(2, requires_grad=True)) is x
