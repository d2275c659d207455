"""The kernels as functions on tensors: what they write to, how many programs share a head, their constants.

All take tensors whose channels lie side by side; :mod:`slabformer.ops.kernels.linear_attention` sees to that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from slabformer.ops.kernels.backward import key_gradients_kernel, query_gradients_kernel
from slabformer.ops.kernels.forward import attend_kernel, sum_keys_kernel

#: programs that each processor of the GPU should find; where heads are fewer, several share one (unmeasured)
PROGRAMS_PER_PROCESSOR = 4
#: tokens below which a head is not shared any further (unmeasured)
SHORTEST_CHUNK = 256


def sum_keys(k: Tensor, v: Tensor, table: Tensor | None, mask: Tensor | None) -> Tensor:
    """``[v, 1]^T relu(k + table) / sqrt(M)``: ``S`` transposed and ``z``, float32 ``(B, num_heads, E + 1, D)``."""
    (B, num_heads, M, D), E = k.shape, v.shape[3]
    parts, chunk = _chunks(M, B * num_heads, k.device)
    sums = k.new_empty((B, num_heads, parts, E + 1, D), dtype=torch.float32)
    arguments = (k, v, _or(table, k), _or(mask, k), sums)
    wrap_triton(sum_keys_kernel)[B * num_heads, parts](
        *arguments,
        *k.stride()[:3],
        *v.stride()[:3],
        *_or(table, k).stride()[1:3],
        _or(mask, k).stride(0),
        num_heads,
        M,
        chunk,
        M**-0.5,
        HAS_TABLE=table is not None,
        HAS_MASK=mask is not None,
        **_constants(k, v, chunk),
    )
    return sums.sum(2)  # in a fixed order, so that runs repeat to the bit


def attend(
    q: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grid_size: tuple[int, int],
    eps: float,
) -> Tensor:
    """``relu(q) S / (relu(q) . z + eps / sqrt(M))`` plus the convolution of ``v``, ``(B, num_heads, N, E)``."""
    (B, num_heads, N, _), E = q.shape, v.shape[3]
    parts, chunk = _chunks(N, B * num_heads, q.device)
    out = q.new_empty((B, N, num_heads, E))
    arguments = (q, v, _or(mask, q), sums, _or(weight, q), _or(bias, q), out)
    wrap_triton(attend_kernel)[B * num_heads, parts](
        *arguments,
        *q.stride()[:3],
        *v.stride()[:3],
        _or(mask, q).stride(0),
        _stride_of_heads(weight),
        _stride_of_heads(bias),
        num_heads,
        N,
        chunk,
        *grid_size,
        eps * v.shape[2] ** -0.5,
        K=0 if weight is None else weight.shape[-1],
        HAS_MASK=mask is not None,
        HAS_BIAS=bias is not None,
        **_constants(q, v, chunk),
    )
    return out.transpose(1, 2)


def query_gradients(q: Tensor, v: Tensor, grad_out: Tensor, sums: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and of ``sums``."""
    (B, num_heads, N, D), E = q.shape, v.shape[3]
    parts, chunk = _chunks(N, B * num_heads, q.device)
    grad_q = q.new_empty((B, N, num_heads, D))
    grad_sums = sums.new_empty((B, num_heads, parts, E + 1, D))
    wrap_triton(query_gradients_kernel)[B * num_heads, parts](
        q,
        grad_out,
        sums,
        grad_q,
        grad_sums,
        *q.stride()[:3],
        *grad_out.stride()[:3],
        num_heads,
        N,
        chunk,
        eps * v.shape[2] ** -0.5,
        **_constants(q, v, chunk),
    )
    return grad_q.transpose(1, 2), grad_sums.sum(2)


def key_gradients(
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    grid_size: tuple[int, int],
    grad_out: Tensor,
    grad_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``k``, of ``v``, and of taps and bias for each head, float32 ``(num_heads, K * K + 1, E)``."""
    (B, num_heads, M, D), E = k.shape, v.shape[3]
    parts, chunk = _chunks(M, B * num_heads, k.device)
    K = 0 if weight is None else weight.shape[-1]
    grad_k, grad_v = k.new_empty((B, M, num_heads, D)), v.new_empty((B, M, num_heads, E))
    grad_window = grad_sums.new_empty((B, num_heads, parts, K * K + 1, E) if K else (B, num_heads, 0, 1, E))
    arguments = (k, v, _or(table, k), _or(mask, k), grad_out, grad_sums, _or(weight, k), grad_k, grad_v, grad_window)
    wrap_triton(key_gradients_kernel)[B * num_heads, parts](
        *arguments,
        *k.stride()[:3],
        *v.stride()[:3],
        *_or(table, k).stride()[1:3],
        *grad_out.stride()[:3],
        _or(mask, k).stride(0),
        _stride_of_heads(weight),
        num_heads,
        M,
        chunk,
        *grid_size,
        M**-0.5,
        K=K,
        HAS_TABLE=table is not None,
        HAS_MASK=mask is not None,
        BLOCK_T=tile_width(K * K + 1),
        **_constants(k, v, chunk),
    )
    return grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_window.sum((0, 2))


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes no None; what stands in for it is never read."""
    return stand_in if tensor is None else tensor


def _stride_of_heads(shared: Tensor | None) -> int:
    """Of a weight or bias that has one row for each head, or one for all."""
    return 0 if shared is None or shared.shape[0] == 1 else shared.stride(0)


def _chunks(num_tokens: int, num_groups: int, device: torch.device) -> tuple[int, int]:
    """How many programs share the tokens of a head, and how many each takes."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // num_groups)
    parts = max(1, min(wanted, num_tokens // SHORTEST_CHUNK))
    return parts, -(-num_tokens // parts)


def _constants(x: Tensor, v: Tensor, chunk: int) -> dict[str, Any]:
    """What every kernel is built for: widths, those of the tiles around them, precision, length class."""
    D, E = x.shape[3], v.shape[3]
    return {
        "D": D,
        "E": E,
        "BLOCK_D": tile_width(D),
        "BLOCK_E": tile_width(E),
        "LENGTH": (chunk > 256) + (chunk > 4096),
        # float32 sums meet half-precision tokens in tensor cores whose inputs have a mantissa as long as float16's
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }


def tile_width(width: int) -> int:
    """The least power of 2 that holds ``width`` and that matrix products take."""
    return max(16, 1 << (width - 1).bit_length())
