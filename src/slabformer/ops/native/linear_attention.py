"""Linear attention on a CPU in C++: an operator that ``torch.compile`` and the FLOP counter see, without a gradient.

Its slow, obvious reference is in :mod:`slabformer.ops.reference`; :mod:`slabformer.ops.dispatch` says when it runs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from slabformer.ops.dispatch import NATIVE_STEP, needs_gradient
from slabformer.ops.native.build import library

#: of queries, keys and values
Biases = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_BIASES: Biases = (None, None, None)
#: how C++ calls the dtypes that it takes
TOKENS = {torch.float32: "float", torch.bfloat16: "BFloat16"}
NUM_POINTERS, NUM_SIZES = 10, 22
#: of the convolution, as in C++
LONGEST_KERNEL = 31


@functools.cache
def prepare(dtype: torch.dtype, head_dim: int, value_dim: int) -> ctypes.CDLL:
    """Build, or load, what runs heads of these widths.

    Args:
        dtype: float32 or bfloat16.
        head_dim: ``D``, a multiple of 16.
        value_dim: ``E``, a multiple of 16.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    built = library("linear_attention.cpp", D=head_dim, E=value_dim, Token=TOKENS[dtype])
    built.linear_attention.argtypes = [ctypes.c_void_p] * (NUM_POINTERS + 1) + [ctypes.c_float, ctypes.c_int]
    return built


def native_linear_attention(
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
    biases: Biases = NO_BIASES,
) -> Tensor:
    """:func:`slabformer.ops.fused.fused_linear_attention` on a CPU: float32 or bfloat16, widths multiples of 16.

    Raises:
        ValueError: If shapes do not fit one another, widths are no multiples of 16, the convolution's kernel is even or
            longer than 31, or a tensor needs a gradient.
        MemoryError: If there is not enough of it.
        BuildError: If there is no compiler, or it fails.
    """
    if needs_gradient(q, k, v, table, weight, bias, *biases):
        raise ValueError("the attention in C++ has no gradient; call it under torch.no_grad(), or linear_attention()")
    # what does not depend on tokens is brought into order outside of the operator, where a compiler does it once
    q_bias, k_bias, v_bias = (_whole(each) for each in biases)
    if k_bias is not None:
        row = k_bias[None, :, None].to(q.dtype)
        table = row.expand(1, *k.shape[1:]) if table is None else table.to(q.dtype) + row
    table = None if table is None else table.to(q.dtype)
    taps = None if weight is None else _whole(weight.flatten(2).transpose(1, 2))
    shifts = q_bias, v_bias, taps, _whole(bias)
    return torch.ops.slabformer.linear_attention_native(q, k, v, table, mask, *shifts, grid_size, eps)


def _whole(small: Tensor | None) -> Tensor | None:
    return None if small is None else small.float().contiguous()


_LIBRARY = Library("slabformer", "FRAGMENT")
_LIBRARY.define(
    "linear_attention_native(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? mask, Tensor? q_bias, "
    "Tensor? v_bias, Tensor? taps, Tensor? bias, int[] grid_size, float eps) -> Tensor"
)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    mask: Tensor | None,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    taps: Tensor | None,
    bias: Tensor | None,
    grid_size: Sequence[int],
    eps: float,
) -> Tensor:
    (B, num_heads, N, D), (M, E) = q.shape, v.shape[2:]
    kernel_size = 0 if taps is None else round(taps.shape[1] ** 0.5)
    others = {"table": table, "mask": mask, "q_bias": q_bias, "v_bias": v_bias, "taps": taps, "bias": bias}
    _check(q, k, v, others, grid_size)
    if not B * num_heads * N * M:
        return empty_outputs(q, k, v).zero_()  # no token, or no key that a query could meet
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    table = table if table is None or table.stride(3) == 1 else table.contiguous()
    mask, q_bias, v_bias, taps, bias = (
        None if t is None else t.contiguous() for t in (mask, q_bias, v_bias, taps, bias)
    )
    out = empty_outputs(q, k, v)
    grid = grid_size if kernel_size else (0, 0)
    sizes = [B, num_heads, N, M, kernel_size, *grid, 1 if taps is None else len(taps)]
    strides = [stride for t in (q, k, v, out) for stride in t.stride()[:3]]
    strides += (0, 0) if table is None else table.stride()[1:3]
    pointers = [None if t is None else t.data_ptr() for t in (q, k, v, table, mask, q_bias, v_bias, taps, bias, out)]
    numbers = (ctypes.c_int64 * NUM_SIZES)(*sizes, *strides)
    run = prepare(q.dtype, D, E).linear_attention
    if run(*pointers, ctypes.addressof(numbers), eps, torch.get_num_threads()):
        raise MemoryError(f"linear attention of {tuple(q.shape)} queries and {M} keys does not fit the memory")
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, others: Mapping[str, Tensor | None], grid_size: Sequence[int]) -> None:
    """Refuse what C++ would read beyond its end."""
    (B, num_heads, N, D), (M, E), taps = q.shape, v.shape[2:], others["taps"]
    if min(D, E) < NATIVE_STEP or D % NATIVE_STEP or E % NATIVE_STEP:
        raise ValueError(f"widths of heads must be multiples of {NATIVE_STEP}, got {D} and {E}")
    if q.dtype not in TOKENS:
        raise ValueError(f"q must be one of {', '.join(map(str, TOKENS))}, got {q.dtype}")
    sets, size = (1, 1) if taps is None else (len(taps), round(taps.shape[1] ** 0.5))
    if size > LONGEST_KERNEL or size % 2 == 0:
        raise ValueError(f"kernels must be odd, {LONGEST_KERNEL}x{LONGEST_KERNEL} at most, got {size}x{size}")
    expected = {
        "k": ((B, num_heads, M, D), q.dtype),
        "v": ((B, num_heads, M, E), q.dtype),
        "table": ((1, num_heads, M, D), q.dtype),
        "mask": ((B, M), torch.bool),
        "q_bias": ((num_heads, D), torch.float32),
        "v_bias": ((num_heads, E), torch.float32),
        "taps": ((num_heads if sets > 1 else 1, size**2, E), torch.float32),
        "bias": ((sets, E), torch.float32),
    }
    for name, tensor in {"k": k, "v": v, **others}.items():
        shape, dtype = expected[name]
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise ValueError(f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if taps is not None and not grid_size[0] * grid_size[1] == N == M:
        raise ValueError(f"a convolution needs {N} queries and {M} keys on one grid, got grid_size {tuple(grid_size)}")


def empty_outputs(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """Memory for what the operator returns: tokens come before heads, as the projection behind reads them."""
    B, num_heads, N = q.shape[:3]
    return q.new_empty((B, N, num_heads, v.shape[3])).transpose(1, 2)


_LIBRARY.impl("linear_attention_native", _run, "CPU")
torch.library.register_fake("slabformer::linear_attention_native", empty_outputs, lib=_LIBRARY)


@register_flop_formula(torch.ops.slabformer.linear_attention_native)
def _flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    table: object,
    mask: object,
    q_bias: object,
    v_bias: object,
    taps: Sequence[int] | None,
    *_: object,
    **__: object,
) -> int:
    """Two a multiply-add: the sums over keys, the queries' products with them, the convolution."""
    (B, num_heads, N, D), (M, E) = q, v[2:]
    window = N * E * taps[1] if taps else 0
    return 2 * B * num_heads * ((N + M) * D * E + window)
