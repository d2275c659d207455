"""Linear attention on Triton: operators that autograd, ``torch.compile``, export and the FLOP counter see.

Its slow, obvious reference is in :mod:`slabformer.ops.reference`; :mod:`slabformer.ops.dispatch` says when it runs. The
sums over keys are kept for the backward, the output is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula

from slabformer.ops.dispatch import WIDEST
from slabformer.ops.kernels.launch import attend, key_gradients, query_gradients, sum_keys, tile_width

#: ``D * E`` of the tiles that sums in float32 are held in
LARGEST_STATE = 64 * 64


def triton_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    grid_size: tuple[int, int] = (0, 0),
    eps: float = 1e-6,
) -> Tensor:
    """:func:`slabformer.ops.fused.fused_linear_attention` on a GPU: float32, bfloat16 or float16, widths 16 to 128."""
    columns = _columns_at_once(q)
    if columns >= v.shape[3]:
        return linear_attention_op(q, k, v, table, mask, weight, bias, grid_size, eps)[0]
    outputs = [
        linear_attention_op(q, k, v[..., i], table, mask, _rows(weight, i), _rows(bias, i), grid_size, eps)[0]
        for i in (slice(start, start + columns) for start in range(0, v.shape[3], columns))
    ]
    return torch.cat(outputs, -1)


def _columns_at_once(q: Tensor) -> int:
    """Columns of the values that one call takes: factors of four bytes must fit the shared memory of small GPUs too."""
    return WIDEST if q.dtype == torch.bfloat16 else LARGEST_STATE // tile_width(q.shape[3])


def _rows(of_channels: Tensor | None, rows: slice) -> Tensor | None:
    return None if of_channels is None else of_channels[:, rows]


@triton_op("slabformer::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    grid_size: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Outputs as of :func:`triton_linear_attention`, and sums over keys, float32 ``(B, num_heads, E + 1, D)``."""
    (q, k, v, table), (mask, weight, bias) = _unit_stride(q, k, v, table), _contiguous(mask, weight, bias)
    sums = sum_keys(k, v, table, mask)
    return attend(q, v, mask, sums, weight, bias, (grid_size[0], grid_size[1]), eps), sums


@triton_op("slabformer::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    sums: Tensor,
    grid_size: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and of taps and bias for each head, float32 ``(num_heads, K * K + 1, E)``."""
    (grad_out, q, k, v, table), (mask, weight) = _unit_stride(grad_out, q, k, v, table), _contiguous(mask, weight)
    grad_q, grad_sums = query_gradients(q, v, grad_out, sums, eps)
    grid = (grid_size[0], grid_size[1])
    return grad_q, *key_gradients(k, v, table, mask, weight, grid, grad_out, grad_sums)


@linear_attention_op.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Shapes alone: tracing through the launches would tie a program to the sizes that they divide the work by."""
    (B, num_heads, N, D), E = q.shape, v.shape[3]
    sums = q.new_empty((B, num_heads, E + 1, D), dtype=torch.float32)
    return q.new_empty((B, N, num_heads, E)).transpose(1, 2), sums


@linear_attention_backward_op.register_fake
def _gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    sums: Tensor,
    *_: object,
) -> tuple[Tensor, ...]:
    K = 0 if weight is None else weight.shape[-1]
    window = sums.new_empty((q.shape[1], K * K + 1, v.shape[3]))
    return *(t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)), window


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, table, mask, weight, bias, ctx.grid_size, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, table, mask, weight, bias, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor, grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
    assert grad_sums is None, "the sums are kept for this function alone"
    q, k, v, table, mask, weight, bias, sums = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_window = linear_attention_backward_op(
        grad_out, q, k, v, table, mask, weight, sums, ctx.grid_size, ctx.eps
    )
    grad_table = None if table is None else grad_k.sum(0, keepdim=True, dtype=torch.float32).to(table.dtype)
    grad_weight, grad_bias = None, None
    if weight is not None:
        grad_window = grad_window.sum(0, keepdim=True) if weight.shape[0] == 1 else grad_window
        grad_weight = grad_window[:, :-1].transpose(1, 2).reshape(weight.shape).to(weight.dtype)
        grad_bias = None if bias is None else grad_window[:, -1].to(bias.dtype)
    return grad_q, grad_k, grad_v, grad_table, None, grad_weight, grad_bias, None, None


linear_attention_op.register_autograd(_backward, setup_context=_save)


def _unit_stride(*tokens: Tensor | None) -> tuple[Any, ...]:
    """Tokens in any order, whose channels lie side by side."""
    return tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tokens)


def _contiguous(*small: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in small)


@register_flop_formula(torch.ops.slabformer.linear_attention)
def _forward_flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    table: object,
    mask: object,
    weight: Sequence[int] | None,
    *_: object,
    **__: object,
) -> int:
    """Two a multiply-add: the sums over keys, the queries' products with them, the convolution."""
    (B, num_heads, N, D), (M, E) = q, v[2:]
    window = N * E * weight[-1] ** 2 if weight else 0
    return 2 * B * num_heads * ((N + M) * D * E + window)


@register_flop_formula(torch.ops.slabformer.linear_attention_backward)
def _backward_flops(
    grad_out: Sequence[int],
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    table: object,
    mask: object,
    weight: Sequence[int] | None,
    *_: object,
    **__: object,
) -> int:
    """The queries' products are made again; each gradient of a product or convolution takes as much as it did."""
    (B, num_heads, N, D), (M, E) = q, v[2:]
    window = 2 * N * E * weight[-1] ** 2 if weight else 0
    return 2 * B * num_heads * ((3 * N + 2 * M) * D * E + window)
