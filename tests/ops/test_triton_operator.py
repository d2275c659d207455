"""The Triton kernels as one operator among torch's: strides, counts, registration, and modules that stand on it.

On a GPU or in a process of `test_triton_interpreter.py`, as `test_triton_kernels.py`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slabformer.nn import SimplifiedLinearAttention
from slabformer.nn.attention_variants import PyramidLinearAttention
from slabformer.nn.stripes import WindowLinearAttention
from slabformer.ops import fused as fused_ops
from slabformer.ops.linear_attention import linear_attention
from tolerances import EXACT, assert_close

pytest.importorskip("triton")
from ops.attention_cases import EPS, make_case
from ops.triton_cases import ON_DEVICES, TOLERANCE, fused
from slabformer.ops.kernels.linear_attention import triton_linear_attention

pytestmark = ON_DEVICES


def test_slices_of_a_packed_projection_are_read_in_place(device, monkeypatch):
    case = make_case(13, device=device)
    packed = torch.stack([t.detach().transpose(1, 2) for t in (case.q, case.k, case.v)], 2)  # (B, N, 3, heads, D)
    q, k, v = (t.squeeze(2).transpose(1, 2) for t in packed.chunk(3, 2))
    expected = fused(case).detach()
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    actual = fused(dataclasses.replace(case, q=q, k=k, v=v))
    assert_close(actual, expected, EXACT)
    assert actual.transpose(1, 2).flatten(2).data_ptr() == actual.data_ptr()  # ready for the output projection


@pytest.mark.slow
def test_gradients_of_any_strides_are_taken(device):
    case = make_case(device=device)
    leaves = list(case.leaves().values())
    expanded = torch.autograd.grad(fused(case).sum(), leaves)
    dense = torch.autograd.grad(fused(case), leaves, torch.ones_like(case.v))
    for a, e in zip(expanded, dense, strict=True):
        assert_close(a, e, EXACT)


def test_flops_are_counted_as_those_of_the_composed_form(device):
    counts = []
    case = make_case(20, 16, device=device, E=32)
    for call in (lambda: fused(case), lambda: linear_attention(case.q, case.k, case.v, order="linear")):
        with FlopCounterMode(display=False) as counter:
            out = call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    with FlopCounterMode(display=False) as counter:
        fused(case).sum().backward()
    assert counter.get_total_flops() == counts[0] + 2 * 2 * 2 * (3 * 20 + 2 * 16) * 16 * 32
    assert out.requires_grad


@pytest.mark.slow
def test_operators_are_registered_as_torch_expects(device):
    case = make_case(device=device, grid_size=(3, 4), table=True)
    arguments = (case.q, case.k, case.v, case.table, None, case.weight, case.bias, [3, 4], EPS)
    operator = torch.ops.slabformer.linear_attention.default
    # torch.compile has no interpreter of Triton
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)
    grad, sums = (t.detach() for t in operator(*arguments))
    backward = torch.ops.slabformer.linear_attention_backward.default
    arguments = (grad, *(None if t is None else t.detach() for t in arguments[:6]), sums, [3, 4], EPS)
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_second_derivative_is_refused(device):
    case = make_case(device=device)
    (first,) = torch.autograd.grad(fused(case).square().sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention_backward"):
        first.sum().backward()


MODULES = {
    "simplified": (SimplifiedLinearAttention, (3, 4), {}),
    "masked values": (SimplifiedLinearAttention, (3, 4), {"attn_mask": torch.arange(12).expand(1, 12) % 5 != 2}),
    "resampled table": (SimplifiedLinearAttention, (3, 4), {"grid_size": (6, 2)}),
    "pyramid": (PyramidLinearAttention, (3, 4), {}),
    "window": (WindowLinearAttention, (2, 3), {"grid_size": (4, 3)}),
}


@pytest.mark.parametrize(
    "name", ["simplified", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODULES)[1:])]
)
def test_modules_compute_the_same_on_the_kernels(name, device, monkeypatch):
    kind, grid, options = MODULES[name]
    place = "window_size" if kind is WindowLinearAttention else "grid_size"
    module = kind(32, 2, kernel_size=3, device=device, **{place: grid})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(1, 12, 32, device=device, requires_grad=True)
    arguments = (inputs,) * (3 if kind is WindowLinearAttention else 1)
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    results = []
    # in the interpreter, too, where the device is a CPU
    monkeypatch.setattr(fused_ops, "native_linear_attention", lambda *a, biases, **k: triton_linear_attention(*a, **k))
    for answer in (True, False):
        monkeypatch.setattr("slabformer.nn.attention.has_kernel", lambda *_, answer=answer: answer)
        out = module(*arguments, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), [inputs, *module.parameters()])))
    for ours, composed in zip(*results, strict=True):
        assert_close(ours, composed, 10 * TOLERANCE[torch.float32])  # through two projections
