"""Simplified linear attention: ReLU instead of softmax, the product in the cheaper order; kernels where there are any.

What stands here is composed of torch's operators, so that compilers for CPUs see through it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from slabformer.ops.dispatch import has_kernel
from slabformer.ops.fused import fused_linear_attention
from slabformer.ops.moments import accumulation_dtype

Order = Literal["linear", "quadratic"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    mask: Tensor | None = None,
    order: Order | None = None,
    eps: float = 1e-6,
    native: bool = False,
) -> Tensor:
    """``o_i = q_i sum_j(k_j^T v_j) / (q_i . sum_j k_j + eps)`` with ``relu(q)``, ``relu(k)`` (Guo et al. 2024, eq. 7).

    Heads before tokens, as in ``F.scaled_dot_product_attention``, in whatever strides: the pass that applies the ReLU
    also brings queries and keys into the order that batched products read, so a transpose on the way in costs nothing.
    Sums over tokens are scaled, and ``eps`` with them, so half precision neither overflows nor needs autocast switched
    off; the normaliser is float32 (float64 for float64).

    Args:
        q: Queries before the ReLU, ``(B, num_heads, N, D)``.
        k: Keys before the ReLU, ``(B, num_heads, M, D)``.
        v: Values, ``(B, num_heads, M, E)``.
        table: Position table, added to the keys before their ReLU, ``(1, num_heads, M, D)`` in any dtype.
        mask: Valid keys, boolean ``(B, M)``; the others count as absent whatever they hold.
        order: "linear" for ``q (k^T v)``, "quadratic" for ``(q k^T) v``; by default the one with fewer products, on
            kernels of our own where :func:`slabformer.ops.dispatch.has_kernel` says so.
        eps: Added to the normaliser.
        native: On a CPU, those kernels are C++ (:mod:`slabformer.ops.native`), built on first use.

    Returns:
        ``(B, num_heads, N, E)`` in the dtype of ``q``; 0 for queries that meet no key.

    Raises:
        ValueError: If the shapes do not fit one another, or ``order`` is unknown.
    """
    _check(q, k, v, table, mask, order)
    if order is None and cheaper_order(q, v) == "linear" and has_kernel(q, k, v, native, (table,)):
        return fused_linear_attention(q, k, v, table=table, mask=mask, eps=eps)
    return composed_linear_attention(q, k, v, table, mask, order, eps)


def composed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    mask: Tensor | None = None,
    order: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`linear_attention` of torch's operators alone, unchecked; TorchScript compiles it."""
    k = k if table is None else k + table.to(k.dtype)
    q, k = q.relu(), k.relu()
    k, v = mask_tokens(k, mask), mask_tokens(v, mask)
    if (cheaper_order(q, v) if order is None else order) == "linear":
        return _linear(q, k, v, eps)
    return _quadratic(q, k, v, eps)


def mask_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens ``(B, num_heads, N, D)`` with 0 wherever ``mask``, boolean ``(B, N)``, is false, NaN included."""
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0)


def cheaper_order(q: Tensor, v: Tensor) -> str:
    """The order of products with fewer multiplications per head."""
    (N, D), (M, E) = q.shape[2:], v.shape[2:]
    return "linear" if (N + M) * D * E <= N * M * (D + E) else "quadratic"


def _linear(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    # sums over tokens grow with M, or with its root where signs cancel: scaled by the root, float16 holds either
    scale = max(k.shape[2], 1) ** -0.5
    dtype, wide = q.dtype, accumulation_dtype(q.dtype)
    q, k, v = q.contiguous(), (k * scale).contiguous(), v.contiguous()
    kv = k.transpose(2, 3) @ v  # (B, num_heads, D, E)
    normaliser = (q * k.sum(2, keepdim=True, dtype=wide)).sum(3, keepdim=True, dtype=wide) + eps * scale
    if kv.dtype == torch.float16:  # dividing first keeps the product in range; keys all 0 would give infinity times 0
        q = (q / normaliser).clamp(max=65504.0).to(torch.float16)
        return (q @ kv).to(dtype)
    # dividing last, in the pass that reads the product anyway: the queries are written without waiting for the keys
    return (q.to(kv.dtype) @ kv / normaliser).to(dtype)


def _quadratic(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    weights = q @ k.transpose(2, 3)
    normaliser = weights.sum(3, keepdim=True, dtype=accumulation_dtype(q.dtype)) + eps
    # rows that sum to 1 at most keep the second product in range
    return ((weights / normaliser).to(v.dtype) @ v).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, mask: Tensor | None, order: str | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"linear_attention needs (B, num_heads, N, D) tensors, got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"linear_attention needs q and k of one width, k and v of one length, got {shapes}")
    if table is not None and table.shape != (1, *k.shape[1:]):
        raise ValueError(f"linear_attention needs a table of shape {(1, *k.shape[1:])}, got {tuple(table.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"linear_attention needs a boolean mask of shape {(k.shape[0], k.shape[2])}, true for valid keys, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if order is not None and order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)} or None, got {order!r}")
