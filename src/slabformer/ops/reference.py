"""Slow, obvious float64 references that the fast functions are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """:func:`slabformer.ops.linear_attention` in float64, head by head, with the whole attention matrix.

    Shape:
        ``q`` ``(B, num_heads, N, D)``, ``k`` ``(B, num_heads, M, D)``, ``v`` ``(B, num_heads, M, E)``, ``mask``
        ``(B, M)``, to float64 ``(B, num_heads, N, E)``.
    """
    q, k, v = q.double(), k.double(), v.double()
    images = []
    for b in range(q.shape[0]):
        valid = slice(None) if mask is None else mask[b]
        heads = []
        for h in range(q.shape[1]):
            weights = q[b, h].relu() @ k[b, h, valid].relu().T
            heads.append(weights @ v[b, h, valid] / (weights.sum(-1, keepdim=True) + eps))
        images.append(torch.stack(heads))
    return torch.stack(images)
