"""What counts as the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer.deployment.equality import verify_fused


class Cancelling(nn.Module):
    """A model whose float32 outputs are mostly rounding: it adds and takes away a large number."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) + self.shift) - self.shift


def perturbed(model: nn.Module, by: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer.bias += by
    return other


def test_a_difference_above_the_tolerance_is_refused() -> None:
    model = Cancelling(0.0)
    with pytest.raises(sf.VerificationError, match="outputs differ"):
        verify_fused(model, perturbed(model, 1e-3), torch.randn(4, 8))


def test_an_ill_conditioned_model_may_differ_by_what_float32_costs_it() -> None:
    torch.manual_seed(0)
    model = Cancelling(1e4)
    assert verify_fused(model, perturbed(model, 4e-4), torch.randn(64, 8)).max_rel > 1e-5


def test_an_ill_conditioned_model_may_not_differ_by_more() -> None:
    model = Cancelling(1e4)
    with pytest.raises(sf.VerificationError, match="outputs differ"):
        verify_fused(model, perturbed(model, 0.1), torch.randn(64, 8))
