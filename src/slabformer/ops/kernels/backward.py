"""Linear attention backward: gradients of queries and of the sums in one pass, then those of keys and values."""

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
def query_gradients_kernel(
    q: tl.tensor,
    grad_out: tl.tensor,
    sums: tl.tensor,
    grad_q: tl.tensor,
    grad_sums: tl.tensor,
    stride_qb: tl.tensor,
    stride_qh: tl.tensor,
    stride_qn: tl.tensor,
    stride_ob: tl.tensor,
    stride_oh: tl.tensor,
    stride_on: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    chunk: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    E: tl.constexpr,
    LENGTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One chunk of queries: their gradients, and their part of the sums' ``(B, num_heads, parts, E + 1, D)``.

    With ``n = relu(q) S``, ``c = relu(q) . z + eps`` and ``o = n / c``: ``dn = do / c``, ``dc = -(do . n) / c^2``.
    """
    q, grad_out = head_of(q, stride_qb, stride_qh, num_heads), head_of(grad_out, stride_ob, stride_oh, num_heads)
    grad_q = head_of(grad_q, num_tokens * num_heads * D, D, num_heads)
    sums = head_of(sums, num_heads * (E + 1) * D, (E + 1) * D, num_heads)
    products, totals = load_sums(sums, D, E, BLOCK_D, BLOCK_E)
    products = factor(products, q)
    grad_products = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    grad_totals = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, num_tokens)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        raw = load_tokens(q, rows, rows < last, stride_qn, D, BLOCK_D).to(tl.float32)
        queries = relu(raw)
        grad = load_tokens(grad_out, rows, rows < last, stride_on, E, BLOCK_E).to(tl.float32)
        inverse = 1 / (tl.sum(queries * totals[None, :], 1) + eps)
        numerator = tl.dot(factor(queries, q), products, input_precision=PRECISION)
        grad_normaliser = -tl.sum(grad * numerator, 1) * inverse * inverse
        through = tl.dot(factor(grad, q), tl.trans(products), input_precision=PRECISION) * inverse[:, None]
        through += grad_normaliser[:, None] * totals[None, :]
        store_tokens(grad_q, tl.where(raw > 0, through, 0.0), rows, last, num_heads * D, D, BLOCK_D)
        shares = tl.trans(factor(grad * inverse[:, None], q))
        grad_products = tl.dot(shares, factor(queries, q), grad_products, input_precision=PRECISION)
        grad_totals += tl.sum(queries * grad_normaliser[:, None], 0)
    store_sums(grad_sums, grad_products, grad_totals, D, E, BLOCK_D, BLOCK_E)


@triton.autotune(CONFIGS, key=[*WIDTHS, "K"])
@triton.jit
def key_gradients_kernel(
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    mask: tl.tensor,
    grad_out: tl.tensor,
    grad_sums: tl.tensor,
    weight: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    grad_window: tl.tensor,
    stride_kb: tl.tensor,
    stride_kh: tl.tensor,
    stride_kn: tl.tensor,
    stride_vb: tl.tensor,
    stride_vh: tl.tensor,
    stride_vn: tl.tensor,
    stride_th: tl.tensor,
    stride_tn: tl.tensor,
    stride_ob: tl.tensor,
    stride_oh: tl.tensor,
    stride_on: tl.tensor,
    stride_mb: tl.tensor,
    stride_wh: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    chunk: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One chunk of keys: gradients of keys and values, and its part of those of the depthwise window.

    ``dk = v dS^T + dz`` where ``k + table > 0``, ``dv = relu(k + table) dS``, both times ``scale``; where ``K > 0``, dv
    gains the window over the outputs' gradients, turned around.
    """
    k, v = head_of(k, stride_kb, stride_kh, num_heads), head_of(v, stride_vb, stride_vh, num_heads)
    table, mask = head_of(table, 0, stride_th, num_heads), head_of(mask, stride_mb, 0, num_heads)
    grad_k = head_of(grad_k, num_tokens * num_heads * D, D, num_heads)
    grad_v = head_of(grad_v, num_tokens * num_heads * E, E, num_heads)
    grad_out, weight = head_of(grad_out, stride_ob, stride_oh, num_heads), head_of(weight, 0, stride_wh, num_heads)
    grad_sums = head_of(grad_sums, num_heads * (E + 1) * D, (E + 1) * D, num_heads)
    grad_products, grad_totals = load_sums(grad_sums, D, E, BLOCK_D, BLOCK_E)
    grad_products = factor(grad_products * scale, k)
    grad_totals *= scale
    grad_taps = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, num_tokens)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        valid = valid_keys(mask, rows, rows < last, HAS_MASK)
        raw = load_keys(k, table, rows, valid, stride_kn, stride_tn, D, BLOCK_D, HAS_TABLE)
        values = load_tokens(v, rows, valid, stride_vn, E, BLOCK_E).to(tl.float32)
        through = tl.dot(factor(values, k), tl.trans(grad_products), input_precision=PRECISION) + grad_totals[None, :]
        store_tokens(grad_k, tl.where(raw > 0, through, 0.0), rows, last, num_heads * D, D, BLOCK_D)
        grad_values = tl.dot(factor(relu(raw), k), grad_products, input_precision=PRECISION)
        if K > 0:
            for tap in range(K * K):
                # the output that this tap took the value to lies on its other side
                near, on_grid = neighbours(rows, rows < last, K // 2 - tap // K, K // 2 - tap % K, height, width)
                grad = load_tokens(grad_out, near, on_grid, stride_on, E, BLOCK_E).to(tl.float32)
                grad_values += grad * _tap(weight, tap, E, K, BLOCK_E)[None, :]
                grad_taps += _row(tap, tl.sum(grad * values, 0), BLOCK_T)
            grad = load_tokens(grad_out, rows, rows < last, stride_on, E, BLOCK_E).to(tl.float32)
            grad_taps += _row(K * K, tl.sum(grad, 0), BLOCK_T)
            grad_values = tl.where(valid[:, None], grad_values, 0.0)
        store_tokens(grad_v, grad_values, rows, last, num_heads * E, E, BLOCK_E)
    if K > 0:
        _store_window(grad_window, grad_taps, E, K, BLOCK_E, BLOCK_T)


@triton.jit
def _tap(weight: tl.tensor, tap: tl.tensor, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr) -> tl.tensor:
    """One place of the kernels of all channels."""
    e = tl.arange(0, BLOCK_E)
    return tl.load(weight + e * (K * K) + tap, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
def _row(index: tl.tensor, values: tl.tensor, BLOCK_T: tl.constexpr) -> tl.tensor:
    """``values`` ``(BLOCK_E,)`` in one row of a tile ``(BLOCK_T, BLOCK_E)`` of zeros."""
    return tl.where((tl.arange(0, BLOCK_T) == index)[:, None], values[None, :], 0.0)


@triton.jit
def _store_window(
    grad_window: tl.tensor,
    grad_taps: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Write this program's part of the gradients of all taps and, behind them, of the bias, ``(K * K + 1, E)``."""
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    taps, e = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    places = grad_window + part * (K * K + 1) * E + taps[:, None] * E + e[None, :]
    tl.store(places, grad_taps, mask=(taps <= K * K)[:, None] & (e < E)[None, :])
