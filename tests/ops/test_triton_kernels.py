"""The Triton kernels against the float64 reference: natively on a GPU, else in Triton's interpreter.

The interpreter has to be switched on before the kernels are imported: `test_triton_interpreter.py` starts these tests
in a process of their own.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slabformer.nn import SimplifiedLinearAttention
from slabformer.nn.attention_variants import PyramidLinearAttention
from slabformer.nn.window_attention import WindowLinearAttention
from slabformer.ops.linear_attention import linear_attention
from tolerances import EXACT, assert_close

pytest.importorskip("triton")
from ops.triton_cases import EPS, Case, make_case
from slabformer.ops.kernels import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),  # said by Triton 3.9 to every caller
]

#: float32, which tensor cores take as three products of TF32; a unit in the last place, of the shorter formats, of
#: outputs that are ten times their scale
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and workspaces hold NaN until a kernel has written them."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return new_empty(self, *args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def assert_follows_reference(case: Case, tolerance: float) -> None:
    """Hold output and all gradients against the reference's."""
    actual, expected = case.fused(), case.expected()
    assert actual.dtype == case.q.dtype
    assert_close(actual, expected, tolerance)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(actual.device, torch.float64)
    leaves = case.leaves()
    ours = torch.autograd.grad((actual.double() * weight).sum(), list(leaves.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(leaves.values()))
    for name, a, e in zip(leaves, ours, theirs, strict=True):
        assert a.dtype == leaves[name].dtype, name
        # gradients of the few queries with a small normaliser are tens of times the scale, and so is their last place
        assert_close(a, e, tolerance if case.q.dtype == torch.float32 else 4 * tolerance)


@pytest.mark.parametrize(
    ("N", "M", "D", "E"),
    [
        (1, 1, 16, 16),
        (7, 7, 24, 16),
        (7, 33, 16, 48),
        (33, 7, 32, 32),
        pytest.param(49, 49, 64, 64, marks=pytest.mark.slow),
        pytest.param(50, 67, 48, 96, marks=pytest.mark.slow),
        pytest.param(19, 19, 96, 80, marks=pytest.mark.slow),
        pytest.param(33, 33, 128, 128, marks=pytest.mark.slow),
        pytest.param(197, 197, 32, 32, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_equal_the_reference(N, M, D, E, device):
    assert_follows_reference(make_case(N, M, D, E, device=device), TOLERANCE[torch.float32])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("table", [False, True], ids=["plain", "table"])
def test_table_and_mask_equal_the_reference(table, masked, device):
    assert_follows_reference(make_case(7, 12, device=device, table=table, masked=masked), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("dtype", "D"),
    [
        (torch.bfloat16, 16),
        (torch.float16, 16),
        pytest.param(torch.bfloat16, 128, marks=pytest.mark.slow),
        pytest.param(torch.float16, 96, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_shorter_dtypes_follow_the_reference(dtype, D, device):
    assert_follows_reference(make_case(D=D, device=device, dtype=dtype, table=True, masked=True), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "masked", [pytest.param(False, marks=pytest.mark.slow, id="all"), pytest.param(True, id="masked")]
)
@pytest.mark.parametrize(
    ("grid_size", "kernel_size", "shared"),
    [
        ((3, 5), 3, True),
        pytest.param((5, 2), 3, False, marks=pytest.mark.slow),
        pytest.param((6, 5), 5, False, marks=pytest.mark.slow),
        pytest.param((1, 7), 5, True, marks=pytest.mark.slow),
        pytest.param((9, 13), 7, False, marks=pytest.mark.slow),
    ],
)
def test_the_depthwise_branch_equals_a_convolution(grid_size, kernel_size, shared, masked, device):
    case = make_case(device=device, grid_size=grid_size, kernel_size=kernel_size, shared=shared, masked=masked)
    assert_follows_reference(case, TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_depthwise_branch_equals_a_convolution_in_shorter_dtypes(dtype, device):
    assert_follows_reference(make_case(device=device, grid_size=(6, 5), D=32, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.slow
def test_wide_values_in_slices_equal_the_reference(device, monkeypatch):
    from slabformer.ops.kernels import linear_attention as module

    monkeypatch.setattr(module, "LARGEST_STATE", 16 * 16)
    case = make_case(B=1, device=device, grid_size=(2, 4), E=24, D=16, table=True)
    assert_follows_reference(case, TOLERANCE[torch.float32])


@pytest.mark.parametrize("parts", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_programs_that_share_a_head_equal_the_reference(parts, device, monkeypatch):
    share_heads(monkeypatch, parts)
    assert_follows_reference(make_case(B=1, device=device, grid_size=(3, 6), table=True), TOLERANCE[torch.float32])


@pytest.mark.slow
def test_programs_that_share_a_head_repeat_to_the_bit(device, monkeypatch):
    share_heads(monkeypatch, 3)
    case = make_case(48, B=1, device=device)
    runs = [torch.autograd.grad(case.fused().sum(), list(case.leaves().values())) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_close(first, second, EXACT)


def share_heads(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(launch, "_chunks", lambda num_tokens, *_: (parts, -(-num_tokens // parts)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts a CPU's one processor")
def test_a_head_is_shared_where_heads_are_few(device):
    long, short, heads = 4 * launch.SHORTEST_CHUNK + 1, launch.SHORTEST_CHUNK - 1, launch.PROGRAMS_PER_PROCESSOR
    assert launch._chunks(long, 1, torch.device(device)) == (heads, -(-long // heads))
    assert launch._chunks(long, heads, torch.device(device)) == (1, long)
    assert launch._chunks(short, 1, torch.device(device)) == (1, short)


def test_slices_of_a_packed_projection_are_read_in_place(device, monkeypatch):
    case = make_case(13, device=device)
    packed = torch.stack([t.detach().transpose(1, 2) for t in (case.q, case.k, case.v)], 2)  # (B, N, 3, heads, D)
    q, k, v = (t.squeeze(2).transpose(1, 2) for t in packed.chunk(3, 2))
    expected = case.fused().detach()
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    actual = dataclasses.replace(case, q=q, k=k, v=v).fused()
    assert_close(actual, expected, EXACT)
    assert actual.transpose(1, 2).flatten(2).data_ptr() == actual.data_ptr()  # ready for the output projection


@pytest.mark.slow
def test_gradients_of_any_strides_are_taken(device):
    case = make_case(device=device)
    leaves = list(case.leaves().values())
    expanded = torch.autograd.grad(case.fused().sum(), leaves)
    dense = torch.autograd.grad(case.fused(), leaves, torch.ones_like(case.v))
    for a, e in zip(expanded, dense, strict=True):
        assert_close(a, e, EXACT)


@pytest.mark.parametrize("dead", ["queries", "keys", "mask"])
def test_queries_that_meet_no_key_give_zero(dead, device):
    case = make_case(device=device, dtype=torch.float16)
    changes = {"queries": {"q": -case.q.abs()}, "keys": {"k": -case.k.abs()}}
    changes["mask"] = {"mask": torch.zeros(2, 12, dtype=torch.bool, device=device)}
    out = dataclasses.replace(case, **changes[dead]).fused(eps=1e-6)
    assert_close(out, torch.zeros_like(out), EXACT)


def test_masked_tokens_count_as_absent_whatever_they_hold(device):
    case = make_case(B=1, device=device, grid_size=(3, 4), masked=True, table=True)
    hidden = ~case.mask[:, None, :, None]
    nan = [t.detach().masked_fill(hidden, float("nan")).requires_grad_() for t in (case.k, case.v)]
    out = dataclasses.replace(case, k=nan[0], v=nan[1]).fused()
    assert_close(out, case.expected(), TOLERANCE[torch.float32])
    for gradient in torch.autograd.grad(out.sum(), nan):
        assert_close(
            gradient[hidden.expand_as(gradient)], torch.zeros_like(gradient[hidden.expand_as(gradient)]), EXACT
        )
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_is_not_hidden(name, device):
    case = make_case(device=device)
    broken = getattr(case, name).detach().clone()
    broken[0, 0, 3] = float("nan")
    out = dataclasses.replace(case, **{name: broken}).fused()
    assert out[0, 0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_that_leave_the_range_of_float16_stay_finite(dtype, device):
    case = make_case(48, device=device, dtype=dtype, num_heads=1)
    large = {name: (getattr(case, name).detach() * 500).requires_grad_() for name in "qkv"}
    case = dataclasses.replace(case, **large)
    assert_close(case.fused(), case.expected(), TOLERANCE[dtype])
    gradients = torch.autograd.grad(case.fused().float().mean(), list(case.leaves().values()))
    assert all(g.isfinite().all() for g in gradients)


def test_flops_are_counted_as_those_of_the_composed_form(device):
    counts = []
    case = make_case(20, 16, device=device, E=32)
    for call in (case.fused, lambda: linear_attention(case.q, case.k, case.v, order="linear")):
        with FlopCounterMode(display=False) as counter:
            out = call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    with FlopCounterMode(display=False) as counter:
        case.fused().sum().backward()
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
    (first,) = torch.autograd.grad(case.fused().square().sum(), case.q, create_graph=True)
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
    for answer in (True, False):
        for room in ("attention", "attention_variants", "window_attention"):
            monkeypatch.setattr(f"slabformer.nn.{room}.has_kernel", lambda *_, answer=answer: answer)
        out = module(*arguments, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), [inputs, *module.parameters()])))
    for ours, composed in zip(*results, strict=True):
        assert_close(ours, composed, 10 * TOLERANCE[torch.float32])  # through two projections
