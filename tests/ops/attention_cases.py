"""Inputs for kernels of linear attention, and what must come out: the float64 reference, plus a convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from slabformer.ops.reference import linear_attention_reference

EPS = 0.1  # near 0, with few keys, the output hardly depends on q, and its gradient is all rounding


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

    def through(self, attend: Callable[..., Tensor], **options: object) -> Tensor:
        """What ``attend`` makes of it."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)} | {"eps": EPS} | options
        return attend(**arguments)

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
