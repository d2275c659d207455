"""Linear attention forward: the sums over keys in one pass over K and V, then each query's share of them."""

from __future__ import annotations

import triton
import triton.language as tl

from slabformer.ops.kernels.tiles import (
    CONFIGS,
    WIDTHS,
    factor,
    head_of,
    load_keys,
    load_sums,
    load_tokens,
    neighbours,
    relu,
    store_sums,
    store_tokens,
    valid_keys,
)


@triton.autotune(CONFIGS, key=WIDTHS)
@triton.jit
def sum_keys_kernel(
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    mask: tl.tensor,
    sums: tl.tensor,
    stride_kb: tl.tensor,
    stride_kh: tl.tensor,
    stride_kn: tl.tensor,
    stride_vb: tl.tensor,
    stride_vh: tl.tensor,
    stride_vn: tl.tensor,
    stride_th: tl.tensor,
    stride_tn: tl.tensor,
    stride_mb: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    chunk: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    E: tl.constexpr,
    LENGTH: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``[v, 1]^T relu(k + table) * scale`` over one chunk of keys, float32 ``(B, num_heads, parts, E + 1, D)``."""
    k, v = head_of(k, stride_kb, stride_kh, num_heads), head_of(v, stride_vb, stride_vh, num_heads)
    table, mask = head_of(table, 0, stride_th, num_heads), head_of(mask, stride_mb, 0, num_heads)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, num_tokens)
    products = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    totals = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        valid = valid_keys(mask, rows, rows < last, HAS_MASK)
        keys = relu(load_keys(k, table, rows, valid, stride_kn, stride_tn, D, BLOCK_D, HAS_TABLE))
        values = load_tokens(v, rows, valid, stride_vn, E, BLOCK_E)
        products = tl.dot(tl.trans(factor(values, v)), factor(keys, k), products, input_precision=PRECISION)
        totals += tl.sum(keys, 0)
    store_sums(sums, products * scale, totals * scale, D, E, BLOCK_D, BLOCK_E)


@triton.autotune(CONFIGS, key=[*WIDTHS, "K"])
@triton.jit
def attend_kernel(
    q: tl.tensor,
    v: tl.tensor,
    mask: tl.tensor,
    sums: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    stride_qb: tl.tensor,
    stride_qh: tl.tensor,
    stride_qn: tl.tensor,
    stride_vb: tl.tensor,
    stride_vh: tl.tensor,
    stride_vn: tl.tensor,
    stride_mb: tl.tensor,
    stride_wh: tl.tensor,
    stride_bh: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    chunk: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``relu(q) S / (relu(q) . z + eps)`` for one chunk of queries, plus the depthwise window over v where ``K > 0``.

    ``out`` lies tokens before heads, ``(B, N, num_heads, E)``.
    """
    q, v = head_of(q, stride_qb, stride_qh, num_heads), head_of(v, stride_vb, stride_vh, num_heads)
    out, mask = head_of(out, num_tokens * num_heads * E, E, num_heads), head_of(mask, stride_mb, 0, num_heads)
    weight, bias = head_of(weight, 0, stride_wh, num_heads), head_of(bias, 0, stride_bh, num_heads)
    sums = head_of(sums, num_heads * (E + 1) * D, (E + 1) * D, num_heads)
    products, totals = load_sums(sums, D, E, BLOCK_D, BLOCK_E)
    products = factor(products, q)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, num_tokens)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        queries = relu(load_tokens(q, rows, rows < last, stride_qn, D, BLOCK_D).to(tl.float32))
        normaliser = tl.sum(queries * totals[None, :], 1) + eps
        tile = tl.dot(factor(queries, q), products, input_precision=PRECISION) / normaliser[:, None]
        if K > 0:
            tile += _window(
                v, mask, weight, bias, rows, rows < last, stride_vn, height, width, E, K, HAS_MASK, HAS_BIAS, BLOCK_E
            )
        store_tokens(out, tile, rows, last, num_heads * E, E, BLOCK_E)


@triton.jit
def _window(
    v: tl.tensor,
    mask: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    stride_vn: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> tl.tensor:
    """Depthwise convolution ``K x K`` of the values around ``rows``; neighbours come from the cache."""
    e = tl.arange(0, BLOCK_E)
    tile = tl.zeros((rows.shape[0], BLOCK_E), tl.float32)
    if HAS_BIAS:
        tile += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    for y in range(K):
        for x in tl.static_range(K):
            near, valid = neighbours(rows, inside, y - K // 2, x - K // 2, height, width)
            valid = valid_keys(mask, near, valid, HAS_MASK)
            values = load_tokens(v, near, valid, stride_vn, E, BLOCK_E).to(tl.float32)
            tap = tl.load(weight + e * (K * K) + y * K + x, mask=e < E, other=0.0).to(tl.float32)
            tile += values * tap[None, :]
    return tile
