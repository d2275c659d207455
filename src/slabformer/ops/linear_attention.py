"""Simplified linear attention: ReLU instead of softmax, the product in the cheaper order."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from slabformer.ops.moments import accumulation_dtype

Order = Literal["linear", "quadratic"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    order: Order | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """``o_i = q_i sum_j(k_j^T v_j) / (q_i . sum_j k_j + eps)`` with ``relu(q)``, ``relu(k)`` (Guo et al. 2024, eq. 7).

    Token-major: heads stay beside their channels, as a linear layer leaves them, so that
    ``x.unflatten(-1, (num_heads, -1))`` on the way in and ``.flatten(2)`` on the way out cost nothing. Sums over tokens
    are scaled by ``1/N``, and ``eps`` with them, so half precision neither overflows nor needs autocast switched off;
    the normaliser is summed in float32 (float64 for float64).

    Args:
        q: Queries before the ReLU, ``(B, N, num_heads, D)``.
        k: Keys before the ReLU, ``(B, M, num_heads, D)``.
        v: Values, ``(B, M, num_heads, E)``.
        mask: Valid keys, boolean ``(B, M)``; the others count as absent whatever they hold.
        order: "linear" for ``q (k^T v)``, "quadratic" for ``(q k^T) v``; by default the one with fewer products.
        eps: Added to the normaliser.

    Returns:
        ``(B, N, num_heads, E)`` in the dtype of ``q``; 0 for queries that meet no key.

    Raises:
        ValueError: If the shapes do not fit one another, or ``order`` is unknown.
    """
    _check(q, k, v, mask, order)
    q, k = q.relu(), k.relu()
    k, v = mask_tokens(k, mask), mask_tokens(v, mask)
    if (order or cheaper_order(q, k, v)) == "linear":
        return _linear(q, k, v, eps)
    return _quadratic(q, k, v, eps)


def mask_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens ``(B, N, *)`` with 0 wherever ``mask``, boolean ``(B, N)``, is false, NaN included."""
    if mask is None:
        return x
    return x.masked_fill(~mask.view(mask.shape + (1,) * (x.ndim - 2)), 0)


def cheaper_order(q: Tensor, k: Tensor, v: Tensor) -> Order:
    """The order of products with fewer multiplications per head."""
    N, M, D, E = q.shape[1], k.shape[1], k.shape[3], v.shape[3]
    return "linear" if (N + M) * D * E <= N * M * (D + E) else "quadratic"


def _linear(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    num_keys = k.shape[1]
    # half on either side: k / N alone would be subnormal in float16
    scale = num_keys**-0.5
    k, v = k * scale, v * scale
    dtype = accumulation_dtype(q.dtype)
    k_mean = k.sum(1, keepdim=True, dtype=dtype) * scale  # (B, 1, num_heads, D)
    normaliser = (q * k_mean).sum(-1, keepdim=True, dtype=dtype) + eps / num_keys  # (B, N, num_heads, 1)
    kv = torch.einsum("bmhd,bmhe->bhde", k, v)
    return (torch.einsum("bnhd,bhde->bnhe", q, kv) / normaliser).to(q.dtype)


def _quadratic(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k)
    normaliser = weights.sum(-1, keepdim=True, dtype=accumulation_dtype(q.dtype)) + eps
    # rows that sum to 1 at most keep the second product in range
    weights = (weights / normaliser).to(q.dtype)
    return torch.einsum("bhnm,bmhe->bnhe", weights, v).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, order: str | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"linear_attention needs (B, N, num_heads, D) tensors, got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"linear_attention needs q and k of one width, k and v of one length, got {shapes}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise ValueError(
            f"linear_attention needs a boolean mask of shape {tuple(k.shape[:2])}, true for valid keys, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if order is not None and order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)} or None, got {order!r}")
