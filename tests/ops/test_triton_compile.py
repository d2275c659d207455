"""Compiles the Triton kernels for GPUs that need not be there: the compiler refuses what the interpreter lets pass."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
import torch
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slabformer.ops.kernels import backward, forward, launch
from slabformer.ops.kernels.linear_attention import (
    LARGEST_STATE,
    linear_attention_backward_op,
    linear_attention_op,
    triton_linear_attention,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),  # said by Triton 3.9 to every caller
]

KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        forward.sum_keys_kernel,
        forward.attend_kernel,
        backward.query_gradients_kernel,
        backward.key_gradients_kernel,
    )
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
ALWAYS_FLOAT32 = {"sums", "grad_sums", "grad_window"}
#: bytes of shared memory that a program may take on the smallest GPUs of compute capability 8 (8.6 and 8.9)
SHARED_MEMORY = 99 * 1024


def compiled(name: str, dtype: torch.dtype, D: int, E: int, capability: int, K: int) -> Any:
    """The kernel's binary in its smallest configuration, with table, mask and bias."""
    kernel = KERNELS[name]
    (config, *_) = kernel.configs
    constants = launch._constants(torch.empty(1, 1, 1, D, dtype=dtype), torch.empty(1, 1, 1, E), 1024)
    constants |= {"K": K, "HAS_TABLE": True, "HAS_MASK": True, "HAS_BIAS": True}
    constants |= {"BLOCK_T": launch.tile_width(K * K + 1), **config.kwargs}
    names = kernel.fn.arg_names
    signature = {argument: kind_of(argument, dtype, constants) for argument in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(names) if signature[argument][0] == "*"}
    used = {(names.index(key),): value for key, value in constants.items() if key in names}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(kernel.fn, signature, used, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def kind_of(argument: str, dtype: torch.dtype, constants: dict[str, Any]) -> str:
    """What Triton calls the type of an argument."""
    if argument in constants:
        return "constexpr"
    if argument in ("scale", "eps"):
        return "fp32"
    if argument.startswith("stride_") or argument in ("num_heads", "num_tokens", "chunk", "height", "width"):
        return "i32"
    if argument == "mask":
        return "*i1"
    return "*fp32" if argument in ALWAYS_FLOAT32 else POINTERS[dtype]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "D", "E", "capability"),
    [
        (torch.bfloat16, 32, 32, 90),
        (torch.bfloat16, 128, 128, 80),
        (torch.float16, 64, 64, 80),
        (torch.float32, 128, LARGEST_STATE // 128, 80),
        (torch.float32, 64, 64, 90),
    ],
    ids=str,
)
def test_kernels_compile_and_fit_the_smallest_gpus(name, dtype, D, E, capability):
    binary = compiled(name, dtype, D, E, capability, K=5)
    assert binary.asm["cubin"]
    assert binary.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("name", ["attend_kernel", "key_gradients_kernel"])
def test_kernels_compile_without_a_convolution(name):
    assert compiled(name, torch.bfloat16, 48, 24, 90, K=0).asm["cubin"]


class OneH100:
    """Stands in for Triton's driver: nothing is launched, but the compiler must know for what it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, torch.compile itself is tested")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_compilers_see_the_kernels_and_what_they_write(masked, monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda self: OneH100()))

    class Both(torch.nn.Module):
        def forward(self, q, k, v, grad, table, weight, bias):
            grid = [3, 4]
            out, sums = linear_attention_op(q, k, v, table, mask, weight, bias, grid, 1e-6)
            gradients = linear_attention_backward_op(grad, q, k, v, table, mask, weight, sums, grid, 1e-6)
            return (out, *gradients)

    with FakeTensorMode(), torch.no_grad():
        q, k, v, grad = torch.empty(4, 2, 2, 12, 32, device="cuda", dtype=torch.bfloat16).unbind()
        mask = torch.ones(2, 12, dtype=torch.bool, device="cuda") if masked else None
        table, weight = torch.empty(1, 2, 12, 32, device="cuda"), torch.empty(1, 32, 3, 3, device="cuda")
        bias = torch.empty(1, 32, device="cuda")
        graph, _ = aot_export_module(Both(), (q, k, v, grad, table, weight, bias), trace_joint=False)
    calls = [node for node in graph.graph.nodes if node.target is triton_kernel_wrapper_functional]
    written = [set(node.kwargs["tensors_to_clone"]) for node in calls]
    assert written == [{"sums"}, {"out"}, {"grad_q", "grad_sums"}, {"grad_k", "grad_v", "grad_window"}]
    assert [tuple(node.meta["val"].shape) for node in graph.graph.output_node().args[0]] == [
        *[(2, 2, 12, 32)] * 4,
        (2, 10, 32),
    ]


def test_an_exported_program_keeps_the_operator_at_any_batch_size():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return triton_linear_attention(q, k, v)

    inputs = torch.randn(3, 2, 2, 1024, 32).unbind()
    program = torch.export.export(Attention(), inputs, dynamic_shapes=[{0: torch.export.Dim("batch", min=1)}] * 3)
    (call,) = [node for node in program.graph.nodes if node.target is torch.ops.slabformer.linear_attention.default]
    assert call.meta["val"][0].shape[1:] == (2, 1024, 32)
    assert not isinstance(call.meta["val"][0].shape[0], int)
