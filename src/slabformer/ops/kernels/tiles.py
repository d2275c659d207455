"""What the kernels of linear attention share: tiles of tokens and of sums, the depthwise window, configurations."""

from __future__ import annotations

import triton
import triton.language as tl

#: whether Triton's interpreter runs the kernels, on a CPU
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: six at most are tried for every key of :data:`TUNING_KEY`; the interpreter runs the first
CONFIGS = [
    triton.Config({"BLOCK_N": block}, num_warps=warps, num_stages=stages)
    for block, warps, stages in [(16, 4, 2), (32, 4, 2), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2)]
][: 1 if INTERPRETED else None]
#: a configuration is chosen anew for every combination of these arguments and the dtypes
WIDTHS = ["D", "E", "LENGTH"]


@triton.jit
def head_of(tokens: tl.tensor, stride_b: tl.tensor, stride_h: tl.tensor, num_heads: tl.tensor) -> tl.tensor:
    """Where the tokens of this program's image and head begin: axis 0 of the grid counts both."""
    index = tl.program_id(0).to(tl.int64)
    return tokens + index // num_heads * stride_b + index % num_heads * stride_h


@triton.jit
def load_tokens(
    tokens: tl.tensor, rows: tl.tensor, valid: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Tile ``(BLOCK_N, BLOCK)`` of tokens ``WIDTH`` wide; what is not valid is 0 and not read."""
    columns = tl.arange(0, BLOCK)
    where = valid[:, None] & (columns < WIDTH)[None, :]
    return tl.load(tokens + rows[:, None] * stride + columns[None, :], mask=where, other=0.0)


@triton.jit
def store_tokens(
    tokens: tl.tensor,
    tile: tl.tensor,
    rows: tl.tensor,
    last: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the rows of a tile ``(BLOCK_N, BLOCK)`` before ``last``, in the dtype of the tokens."""
    columns = tl.arange(0, BLOCK)
    where = (rows < last)[:, None] & (columns < WIDTH)[None, :]
    tl.store(tokens + rows[:, None] * stride + columns[None, :], tile.to(tokens.dtype.element_ty), mask=where)


@triton.jit
def factor(tile: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """A factor of a matrix product: bfloat16 where the tokens are, since it spans what float32 does, else float32."""
    rounded = tile.to(tl.bfloat16 if tokens.dtype.element_ty == tl.bfloat16 else tl.float32)
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16
        rounded = rounded.to(tl.float32)
    return rounded


@triton.jit
def relu(x: tl.tensor) -> tl.tensor:
    """``max(x, 0)``, NaN included, so that a model that has come apart does not look sound."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def valid_keys(mask: tl.tensor, rows: tl.tensor, inside: tl.tensor, HAS_MASK: tl.constexpr) -> tl.tensor:
    """Which of the rows that lie ``inside`` are keys."""
    if HAS_MASK:
        inside = tl.load(mask + rows, mask=inside, other=0).to(tl.int1)
    return inside


@triton.jit
def load_keys(
    k: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    stride_kn: tl.tensor,
    stride_tn: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_TABLE: tl.constexpr,
) -> tl.tensor:
    """Keys before the ReLU with the position table added, float32."""
    keys = load_tokens(k, rows, valid, stride_kn, D, BLOCK_D).to(tl.float32)
    if HAS_TABLE:
        keys += load_tokens(table, rows, valid, stride_tn, D, BLOCK_D).to(tl.float32)
    return keys


@triton.jit
def load_sums(
    sums: tl.tensor, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """``S`` as ``(BLOCK_D, BLOCK_E)`` and ``z`` as ``(BLOCK_D,)`` from one head's ``(E + 1, D)``."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    products = tl.load(sums + d[:, None] + e[None, :] * D, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
    return products, tl.load(sums + E * D + d, mask=d < D, other=0.0)


@triton.jit
def store_sums(
    sums: tl.tensor,
    products: tl.tensor,
    totals: tl.tensor,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Write this program's ``(BLOCK_E, BLOCK_D)`` products and ``(BLOCK_D,)`` totals as ``(E + 1, D)``."""
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    sums += part * (E + 1) * D
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    tl.store(sums + e[:, None] * D + d[None, :], products, mask=(e < E)[:, None] & (d < D)[None, :])
    tl.store(sums + E * D + d, totals, mask=d < D)


@triton.jit
def neighbours(
    rows: tl.tensor, inside: tl.tensor, dy: tl.tensor, dx: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens that lie ``(dy, dx)`` away on the grid, and whether they are on it."""
    y, x = rows // width + dy, rows % width + dx
    return rows + dy * width + dx, inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
