"""Linear attention in C++ against the float64 reference, and where it is not to be used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ops.attention_cases import Case, make_case
from slabformer.measure.timing import num_threads
from slabformer.ops.dispatch import has_kernel
from slabformer.ops.linear_attention import linear_attention
from slabformer.ops.native.linear_attention import LONGEST_KERNEL, native_linear_attention
from tolerances import EXACT, assert_close

pytestmark = pytest.mark.usefixtures("_poisoned", "_compiler")

#: sums run in float32; a unit in the last place of bfloat16, of outputs that are ten times their scale
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@torch.no_grad()
def native(case: Case, **options: object) -> torch.Tensor:
    return case.through(native_linear_attention, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"N": 1, "D": 16},
        {"N": 7, "M": 197, "D": 16},
        {"N": 197, "M": 7, "D": 16, "table": True},
        {"N": 197, "D": 32, "masked": True, "table": True},
        {"grid_size": (1, 1), "D": 16},
        {"grid_size": (14, 14), "D": 32, "table": True, "kernel_size": 5},
        {"grid_size": (3, 11), "D": 32, "kernel_size": 5, "masked": True, "shared": False},
        {"grid_size": (50, 2), "D": 32, "kernel_size": 7},
        {"grid_size": (2, 50), "D": 48, "E": 80, "table": True},
        {"N": 9, "M": 33, "D": 48, "E": 80},
        {"grid_size": (7, 7), "D": 64, "E": 64, "shared": False},
        {"grid_size": (9, 5), "D": 64, "E": 64, "kernel_size": 1},
        {"grid_size": (4, 9), "D": 128, "E": 128, "kernel_size": LONGEST_KERNEL},
    ],
    ids=str,
)
def test_outputs_equal_the_reference(sizes, dtype):
    case = make_case(**sizes, device="cpu", dtype=dtype)
    out = native(case)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_close(out, case.expected(), TOLERANCE[dtype])


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 20)] * 2),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 3, 5]),
    st.sampled_from(list(TOLERANCE)),
    *[st.booleans()] * 3,
    st.integers(1, 9),
)
def test_any_grid_batch_and_number_of_threads_gives_the_same(grid, B, num_heads, size, dtype, table, masked, shared, n):
    case = make_case(
        grid_size=grid,
        D=32,
        B=B,
        num_heads=num_heads,
        kernel_size=size,
        dtype=dtype,
        table=table,
        masked=masked,
        shared=shared,
        device="cpu",
    )
    with num_threads(n):
        assert_close(native(case), case.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_few_images_are_split_by_heads_and_tokens(B, threads):
    case = make_case(grid_size=(13, 5), D=16, B=B, num_heads=3, kernel_size=5, table=True, masked=True, device="cpu")
    with num_threads(threads):
        assert_close(native(case), case.expected(), TOLERANCE[torch.float32])


def test_an_even_kernel_and_a_width_that_vectors_do_not_fill_are_refused():
    with pytest.raises(ValueError, match=r"must be odd, .* got 4x4"):
        native(make_case(grid_size=(4, 5), D=16, kernel_size=4, device="cpu"))
    for widths in ({"D": 24}, {"D": 16, "E": 24}, {"D": 8}):
        with pytest.raises(ValueError, match="widths of heads must be multiples of 16, got"):
            native(make_case(20, **widths, device="cpu"))
    with pytest.raises(ValueError, match=r"q must be one of torch.float32, torch.bfloat16, got torch.float64"):
        native(make_case(20, D=16, dtype=torch.float64, device="cpu"))


def test_slices_of_a_packed_projection_are_read_in_place(monkeypatch):
    case = make_case(grid_size=(4, 5), D=32, device="cpu")
    packed = torch.stack([t.detach().transpose(1, 2) for t in (case.q, case.k, case.v)], 2)  # (B, N, 3, heads, D)
    q, k, v = (t.squeeze(2).transpose(1, 2) for t in packed.chunk(3, 2))
    assert_close(native(dataclasses.replace(case, q=q, k=k, v=v)), native(case), EXACT)


def test_tokens_in_any_strides_are_taken():
    case = make_case(grid_size=(4, 5), D=32, table=True, masked=True, device="cpu")
    turned = {name: getattr(case, name).detach().mT.contiguous().mT for name in ("q", "k", "v", "table")}
    mask = case.mask.t().contiguous().t()
    assert_close(native(dataclasses.replace(case, **turned, mask=mask)), native(case), EXACT)


def test_biases_that_the_projection_left_out_are_added():
    case = make_case(grid_size=(4, 5), D=48, E=80, masked=True, kernel_size=5, device="cpu")
    biases = torch.randn(2, 48), torch.randn(2, 48), torch.randn(2, 80)
    added = {name: (getattr(case, name) + b[:, None]).detach() for name, b in zip("qkv", biases, strict=True)}
    expected = dataclasses.replace(case, **added).expected()
    assert_close(native(case, biases=biases), expected, TOLERANCE[torch.float32])
    table = torch.randn(1, 2, 20, 48)
    expected = dataclasses.replace(case, **added, table=table).expected()
    assert_close(native(dataclasses.replace(case, table=table), biases=biases), expected, TOLERANCE[torch.float32])


def test_masked_tokens_count_as_absent_whatever_they_hold():
    case = make_case(grid_size=(4, 5), D=16, masked=True, device="cpu")
    hidden = ~case.mask[:, None, :, None]
    nan = {name: getattr(case, name).detach().masked_fill(hidden, float("nan")) for name in "kv"}
    assert_close(native(dataclasses.replace(case, **nan)), native(case), EXACT)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_is_not_swallowed(name, dtype):
    case = make_case(8, D=16, dtype=dtype, device="cpu")
    broken = getattr(case, name).detach().clone()
    broken[1, 0, 3, 5] = float("nan")
    out = native(dataclasses.replace(case, **{name: broken}))
    assert out[1, 0].isnan().any()
    assert out[0].isfinite().all()
    assert out[1, 1].isfinite().all()


def test_a_query_that_meets_no_key_gives_zero():
    case = make_case(8, D=16, device="cpu")
    for dead in ("q", "k"):
        zero = -getattr(case, dead).detach().abs()
        out = native(dataclasses.replace(case, **{dead: zero}), eps=1e-6)
        assert torch.equal(out, torch.zeros_like(out))


def test_a_longer_kernel_of_the_convolution_is_refused():
    case = make_case(grid_size=(4, 5), D=16, kernel_size=LONGEST_KERNEL + 2, device="cpu")
    with pytest.raises(ValueError, match=f"{LONGEST_KERNEL}x{LONGEST_KERNEL} at most, got 33x33"):
        native(case)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid_size": (4, 6)}, r"20 queries and 20 keys on one grid, got grid_size \(4, 6\)"),
        (
            {"k": torch.zeros(2, 2, 20, 32)},
            r"k must be torch.float32 \(2, 2, 20, 16\), got torch.float32 \(2, 2, 20, 32\)",
        ),
        ({"v": torch.zeros(2, 2, 20, 16).double()}, r"v must be torch.float32"),
        ({"table": torch.zeros(1, 2, 19, 16)}, r"table must be torch.float32 \(1, 2, 20, 16\)"),
        ({"mask": torch.ones(2, 20)}, r"mask must be torch.bool \(2, 20\), got torch.float32"),
        ({"weight": torch.zeros(3, 16, 3, 3)}, r"taps must be torch.float32 \(2, 9, 16\)"),
        ({"bias": torch.zeros(2, 16)}, r"bias must be torch.float32 \(1, 16\)"),
    ],
    ids=["grid", "k", "v", "table", "mask", "weight", "bias"],
)
def test_what_does_not_fit_is_refused_before_it_is_read(change, said):
    case = dataclasses.replace(make_case(grid_size=(4, 5), D=16, device="cpu"), **change)
    with pytest.raises(ValueError, match=said):
        native(case)


def test_the_operator_is_registered_as_torch_expects():
    case = make_case(grid_size=(4, 5), D=16, table=True, device="cpu")
    taps = case.weight.flatten(2).transpose(1, 2).contiguous().detach()
    tokens = [t.detach() for t in (case.q, case.k, case.v, case.table)]
    arguments = (*tokens, None, None, None, taps, case.bias.detach(), [4, 5], 1e-6)
    torch.library.opcheck(torch.ops.slabformer.linear_attention_native.default, arguments)


def test_flops_are_counted_as_those_of_the_composed_form():
    q, k, v = (t.detach() for t in (make_case(200, 160, 16, 32, device="cpu")).leaves().values())
    counts = []
    for options in ({"order": "linear"}, {"native": True}):
        with FlopCounterMode(display=False) as counter:
            linear_attention(q, k, v, **options)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert has_kernel(q, k, v, native=True)


@pytest.mark.slow
def test_a_compiled_call_runs_it_without_a_copy(monkeypatch):
    case = make_case(grid_size=(6, 6), D=32, device="cpu")
    packed = torch.stack([t.detach().transpose(1, 2) for t in (case.q, case.k, case.v)], 2).flatten(2)

    def call(packed):
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in packed.chunk(3, -1))
        out = native_linear_attention(q, k, v, weight=case.weight, bias=case.bias, grid_size=(6, 6))
        return out.transpose(1, 2).flatten(2)

    with torch.no_grad():
        compiled, code = torch._inductor.utils.run_and_get_code(torch.compile(call), packed)
        assert_close(compiled, call(packed), EXACT)
    assert "linear_attention_native" in code[0]
    assert code[0].count("empty_strided_cpu((2, 2, 36, 32)") == 0
