"""The C++ attention in a library that torch loads: what the operator of this process computes, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ops.attention_cases import make_case
from slabformer.export.own_operators import NATIVE
from slabformer.measure.timing import num_threads
from slabformer.ops.native.linear_attention import native_linear_attention
from slabformer.ops.native.operator import attention_library
from tolerances import EXACT, assert_close

pytestmark = [pytest.mark.usefixtures("_poisoned", "_compiler"), pytest.mark.slow]


class Calls(TorchDispatchMode):
    """Arguments of the calls of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is NATIVE:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def called(**sizes: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """What the operator of this process returns for a case of these sizes, and what it is called with."""
    with Calls() as calls:
        out = make_case(device="cpu", **sizes).through(native_linear_attention)
    return out, calls.seen[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        {"N": 1},
        {"N": 7, "M": 197, "masked": True},
        {"N": 197, "M": 7, "table": True},
        {"grid_size": (5, 7), "table": True, "masked": True},
        {"grid_size": (14, 14), "kernel_size": 5, "shared": False},
        {"grid_size": (6, 4), "dtype": torch.bfloat16, "table": True},
    ],
    ids=["one", "masked", "table", "convolution", "kernels", "bfloat16"],
)
def test_it_computes_the_same_bit_for_bit(sizes, threads):
    with num_threads(threads):
        expected, args = called(**sizes)
        operator, _ = attention_library(args[0].dtype, args[0].shape[3], args[2].shape[3])
        out = operator(*args)
    assert_close(out, expected, EXACT)
    assert out.stride() == expected.stride()


@torch.no_grad()
def test_no_image_and_other_strides_are_taken():
    operator, _ = attention_library(torch.float32, 16, 16)
    expected, args = called(N=6)
    assert operator(*(args[0][:0], args[1][:0], args[2][:0]), *args[3:]).shape == (0, *expected.shape[1:])
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in args[:3]]
    assert_close(operator(*apart, *args[3:]), expected, EXACT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda args: [args[0].double(), *args[1:]], "q must be Float .* got Double"),
        (lambda args: [args[0], args[1][:, :, :5], *args[2:]], "k must be Float"),
        (lambda args: [*args[:7], args[7][:, :4], *args[8:]], "kernels must be odd, got 2"),
        (lambda args: [*args[:9], (3, 3), args[10]], "a convolution needs 12 queries and 12 keys on one grid"),
        (lambda args: [*args[:9], (12,), args[10]], "grid_size must be two numbers"),
        (lambda args: [args[0][0], *args[1:]], "4 axes"),
    ],
    ids=["dtype", "keys", "kernel", "grid", "line", "axes"],
)
@torch.no_grad()
def test_what_would_be_read_beyond_its_end_is_refused(change, said):
    operator, _ = attention_library(torch.float32, 16, 16)
    _, args = called(grid_size=(3, 4))
    operator(*args)
    with pytest.raises(ValueError, match=said):
        operator(*change(list(args)))


def test_a_copy_of_the_library_is_loaded_beside_it(tmp_path: Path):
    operator, library = attention_library(torch.float32, 16, 16)
    torch.ops.load_library(shutil.copyfile(library, tmp_path / "attention_0.so"))
    expected, args = called(N=6)
    assert_close(operator(*args), expected, EXACT)
