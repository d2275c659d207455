"""What tests of the Triton kernels share."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from ops.attention_cases import Case
from slabformer.ops.kernels.linear_attention import triton_linear_attention
from tolerances import assert_close

#: float32, which tensor cores take as three products of TF32; a unit in the last place, of the shorter formats, of
#: outputs that are ten times their scale
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
DEVICES = ["cpu"] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.param("cuda", marks=pytest.mark.gpu)]
#: of every test that runs the kernels: its device, workspaces that hold NaN
ON_DEVICES = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.usefixtures("_poisoned"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),  # said by Triton 3.9 to every caller
]


def fused(case: Case, **options: object) -> Tensor:
    """What the kernels make of it."""
    return case.through(triton_linear_attention, **options)


def assert_follows_reference(case: Case, tolerance: float) -> None:
    """Hold output and all gradients against the reference's."""
    actual, expected = fused(case), case.expected()
    assert actual.dtype == case.q.dtype
    assert_close(actual, expected, tolerance)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(actual.device, torch.float64)
    leaves = case.leaves()
    ours = torch.autograd.grad((actual.double() * weight).sum(), list(leaves.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(leaves.values()))
    for name, a, e in zip(leaves, ours, theirs, strict=True):
        assert a.dtype == leaves[name].dtype, name
        # gradients of the few queries with a small normaliser are tens of times the scale, and so is their last place
        assert_close(a, e, tolerance if case.q.dtype == torch.float32 else 4 * tolerance)
