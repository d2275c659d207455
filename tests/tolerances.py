"""How near is near enough: tolerances have names and are relative to the expected output's scale."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 0.0
ALGEBRA = 1e-10  # float64: the same numbers in another order
FLOAT32 = 1e-5
#: seconds until a child process counts as hung; a busy machine takes minutes over a build
PATIENCE = 300


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Hold the largest difference against ``tolerance`` times the root mean square expected; EXACT is bitwise."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if tolerance == EXACT:
        assert torch.equal(actual, expected), f"not equal, largest difference {(actual - expected).abs().max():.3g}"
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.square().mean().sqrt().item() or 1.0
    error = (actual - expected).abs().max().item() / scale
    assert error <= tolerance, f"differs by {error:.3g} of the scale, at most {tolerance:.3g} allowed"
