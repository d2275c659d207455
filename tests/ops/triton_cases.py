"""Inputs for the Triton kernels, and what must come out: the float64 reference, plus a convolution written out."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slabformer.ops.kernels.linear_attention import fused_linear_attention
from slabformer.ops.reference import linear_attention_reference
from tolerances import assert_close

EPS = 0.1  # near 0, with few keys, the output hardly depends on q, and its gradient is all rounding
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


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None = None
    mask: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    grid_size: tuple[int, int] = (0, 0)

    def leaves(self) -> dict[str, Tensor]:
        """Tensors that have a gradient, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in named.items() if isinstance(t, Tensor) and t.requires_grad}

    def fused(self, **options: object) -> Tensor:
        """What the kernels make of it."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)} | {"eps": EPS} | options
        return fused_linear_attention(**arguments)

    def expected(self) -> Tensor:
        """The same in float64, composed of torch's operators."""
        k = self.k if self.table is None else self.k.double() + self.table.double()
        out = linear_attention_reference(self.q, k, self.v, mask=self.mask, eps=EPS)
        return out if self.weight is None else out + self._convolved()

    def _convolved(self) -> Tensor:
        B, num_heads, N, E = self.v.shape
        v = self.v.double()
        if self.mask is not None:
            v = v.masked_fill(~self.mask[:, None, :, None], 0)
        maps = v.transpose(2, 3).reshape(B, num_heads * E, *self.grid_size)
        weight = self.weight.double().expand(num_heads, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        bias = None if self.bias is None else self.bias.double().expand(num_heads, -1).flatten()
        maps = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=num_heads * E)
        return maps.view(B, num_heads, E, N).transpose(2, 3)


def make_case(
    N: int = 12,
    M: int | None = None,
    D: int = 16,
    E: int | None = None,
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
    B: int = 2,
    num_heads: int = 2,
    table: bool = False,
    masked: bool = False,
    grid_size: tuple[int, int] | None = None,
    kernel_size: int = 3,
    shared: bool = True,
) -> Case:
    """A case of these sizes; with a ``grid_size``, of as many tokens and with a convolution."""
    N = grid_size[0] * grid_size[1] if grid_size else N
    M, E = M or N, E or D
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    q, k, v = leaf(B, num_heads, N, D), leaf(B, num_heads, M, D), leaf(B, num_heads, M, E)
    mask = torch.arange(M, device=device).expand(B, M) % 3 != 1 if masked else None
    rows = 1 if shared else num_heads
    window = grid_size and {
        "weight": leaf(rows, E, kernel_size, kernel_size),
        "bias": leaf(rows, E),
        "grid_size": grid_size,
    }
    return Case(q, k, v, leaf(1, num_heads, M, D) if table else None, mask, **(window or {}))


def assert_follows_reference(case: Case, tolerance: float) -> None:
    """Hold output and all gradients against the reference's."""
    actual, expected = case.fused(), case.expected()
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
