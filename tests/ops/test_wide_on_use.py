"""Large tensors that become float64 whenever they are read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.ops.precision import WIDE_ON_USE_FROM, WideOnUse, widened_on_use


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(300, 300).bfloat16()


def test_large_short_floats_are_widened_on_use_and_nothing_else(weight: Tensor) -> None:
    assert isinstance(widened_on_use(weight), WideOnUse)
    for other in (weight[:2], weight.double(), torch.arange(WIDE_ON_USE_FROM)):
        assert not isinstance(widened_on_use(other), WideOnUse)
    assert widened_on_use(weight[:2]).dtype is torch.float64


def test_it_reads_as_float64_in_every_operation(weight: Tensor) -> None:
    wide, x = widened_on_use(weight), torch.randn(2, 300, dtype=torch.float64)
    assert wide.dtype is torch.float64
    assert wide.shape == weight.shape
    for call in (
        lambda w: F.linear(x, w),
        lambda w: x @ w,
        lambda w: w[3:5].T,
        lambda w: F.embedding(torch.tensor([1, 7]), w),
        lambda w: torch.cat([w, w]).sum(0),
        lambda w: w.view(100, 900).unflatten(1, (9, 100)),
    ):
        actual = call(wide)
        assert type(actual) is Tensor
        assert torch.equal(actual, call(weight.double()))


def test_it_is_a_parameter_of_a_module_and_of_its_copy(weight: Tensor) -> None:
    layer = nn.Linear(300, 300)
    layer.weight = nn.Parameter(widened_on_use(weight), requires_grad=False)
    x = torch.randn(2, 300, dtype=torch.float64)
    assert isinstance(layer.weight, nn.Parameter)
    assert next(layer.parameters()).dtype is torch.float64
    assert torch.equal(copy.copy(layer).double()(x), F.linear(x, weight.double(), layer.bias.double()))


def test_it_holds_no_values_of_its_own(weight: Tensor) -> None:
    wide = widened_on_use(weight)
    weight.fill_(2)
    assert torch.equal(wide.sum(), torch.tensor(2.0 * weight.numel(), dtype=torch.float64))
