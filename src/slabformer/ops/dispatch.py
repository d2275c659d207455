"""When linear attention runs on kernels of our own, Triton on a GPU or C++ on a CPU: the one place that decides."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slabformer._torch import assume_constant_result, in_function_transform

#: head widths that the kernels are built for
NARROWEST, WIDEST = 16, 128
#: and those of the kernel in C++ are multiples of: vectors are read whole
NATIVE_STEP = 16
#: compute capability of the first GPUs with tensor cores for bfloat16 and TF32
OLDEST_GPU = (8, 0)


#: environment variable that turns kernels for GPUs on (1) or off (0)
KERNELS = "SLABFORMER_KERNELS"
#: GPUs, by the names that CUDA has for them, on which ``benchmarks/attention.py`` has timed the kernels
TIMED_GPUS: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """From where on the kernels are worth it.

    Attributes:
        min_tokens: Keys and queries together.
        measurement: File below ``benchmarks/results/`` that says so.
    """

    min_tokens: int
    measurement: str


#: dtypes that the kernels take
THRESHOLDS = {
    torch.bfloat16: Threshold(min_tokens=128, measurement="unmeasured"),
    torch.float16: Threshold(min_tokens=128, measurement="unmeasured"),
    torch.float32: Threshold(min_tokens=128, measurement="unmeasured"),
}
#: the same on a CPU
NATIVE_THRESHOLDS = {
    torch.float32: Threshold(min_tokens=16, measurement="attention/cpu_float32.md"),
    torch.bfloat16: Threshold(min_tokens=16, measurement="attention/cpu_bfloat16.md"),
}


def has_kernel(q: Tensor, k: Tensor, v: Tensor, native: bool = False, also: Iterable[Tensor | None] = ()) -> bool:
    """Whether kernels take ``q`` ``(B, num_heads, N, D)``, ``k`` ``(B, num_heads, M, D)`` and ``v`` of this kind.

    Those for GPUs have a gradient, but neither a second one nor forward-mode derivatives: under :mod:`torch.func` and
    forward mode the answer is no. For a gradient of the gradient, ask :func:`slabformer.ops.linear_attention` for an
    order. Those for CPUs have none, and exported programs do without them but in :func:`native_in_programs`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        native: Whether a CPU may run what is built by its C++ compiler.
        also: What else goes into the attention or into q, k and v: table, kernels, biases, weights of projections. On
            a CPU one that needs a gradient rules kernels out, as q, k and v do; on a GPU they are not looked at.
    """
    on_cpu = native and q.device.type == "cpu"
    thresholds = NATIVE_THRESHOLDS if on_cpu else THRESHOLDS
    if not (on_cpu or q.device.type == "cuda") or not q.dtype == k.dtype == v.dtype or q.dtype not in thresholds:
        return False
    B, N, M = q.shape[0], q.shape[2], k.shape[2]
    narrow, wide = sorted((q.shape[3], v.shape[3]))
    if narrow < NARROWEST or wide > WIDEST or 0 in (B, N, M) or thresholds[q.dtype].min_tokens > N + M:
        return False
    taken = (q, k, v, *also) if on_cpu else (q, k, v)
    if on_cpu and (narrow % NATIVE_STEP or wide % NATIVE_STEP or needs_gradient(*taken) or _is_written_out()):
        return False
    if not all(map(_is_plain, taken)):
        return False
    return not _is_transformed() and (on_cpu or runs_kernels(q.device))


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record what is made of ``tensors``."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether it is no subclass with a life of its own: sharded, quantised, nested. Compilers see through them."""
    return type(tensor) in (Tensor, nn.Parameter) or not isinstance(tensor, Tensor) or torch.compiler.is_compiling()


def _is_written_out() -> bool:
    """Whether what runs becomes a program that others must be able to run without C++ of ours."""
    return not _brings_native.get() and (torch.compiler.is_exporting() or torch.jit.is_tracing())


_brings_native: ContextVar[bool] = ContextVar("brings_native", default=False)


@contextmanager
def native_in_programs() -> Iterator[None]:
    """Inside the block, exported programs call the C++ attention: for whoever ships it with them."""
    token = _brings_native.set(True)
    try:
        yield
    finally:
        _brings_native.reset(token)


def _is_transformed() -> bool:
    """Whether :mod:`torch.func` or forward-mode differentiation runs; neither is compiled into what calls this."""
    if torch.compiler.is_compiling():
        return False
    return in_function_transform()


class _Asked:
    """What :func:`use_kernels` was asked for, in the whole process; None for nothing."""

    wanted: bool | None = None


def use_kernels(wanted: bool | None = True) -> None:
    """Turn the Triton kernels on or off in this process; None leaves it to the environment and to what was timed.

    On GPUs on which they were never timed they are off unless this, or ``SLABFORMER_KERNELS=1``, turns them on: they
    are verified, but nobody has measured that they are faster there. Programs that are compiled already stay as they
    are.
    """
    _Asked.wanted = wanted


@assume_constant_result
def runs_kernels(device: torch.device) -> bool:
    """Whether ``device`` is an NVIDIA GPU with the tensor cores that the kernels use, Triton is installed, and they
    were timed on it or asked for.

    Raises:
        ValueError: If ``SLABFORMER_KERNELS`` is neither 0 nor 1.
    """
    if device.type != "cuda" or torch.version.hip is not None or not _has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_GPU and _is_wanted(device)


def _is_wanted(device: torch.device) -> bool:
    if _Asked.wanted is not None:
        return _Asked.wanted
    said = os.environ.get(KERNELS, "")
    if said not in ("", "0", "1"):
        raise ValueError(f"{KERNELS} must be 0 or 1, got {said!r}")
    return said == "1" if said else torch.cuda.get_device_name(device) in TIMED_GPUS


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
