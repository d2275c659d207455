"""The Triton kernels against the float64 reference: natively on a GPU, else in Triton's interpreter.

The interpreter has to be switched on before the kernels are imported: `test_triton_interpreter.py` starts these tests
in a process of their own.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tolerances import EXACT, assert_close

pytest.importorskip("triton")
from ops.attention_cases import make_case
from ops.triton_cases import ON_DEVICES, TOLERANCE, assert_follows_reference, fused
from slabformer.ops.kernels import launch

pytestmark = ON_DEVICES


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
    runs = [torch.autograd.grad(fused(case).sum(), list(case.leaves().values())) for _ in range(2)]
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


@pytest.mark.parametrize("dead", ["queries", "keys", "mask"])
def test_queries_that_meet_no_key_give_zero(dead, device):
    case = make_case(device=device, dtype=torch.float16)
    changes = {"queries": {"q": -case.q.abs()}, "keys": {"k": -case.k.abs()}}
    changes["mask"] = {"mask": torch.zeros(2, 12, dtype=torch.bool, device=device)}
    out = fused(dataclasses.replace(case, **changes[dead]), eps=1e-6)
    assert_close(out, torch.zeros_like(out), EXACT)


def test_masked_tokens_count_as_absent_whatever_they_hold(device):
    case = make_case(B=1, device=device, grid_size=(3, 4), masked=True, table=True)
    hidden = ~case.mask[:, None, :, None]
    nan = [t.detach().masked_fill(hidden, float("nan")).requires_grad_() for t in (case.k, case.v)]
    out = fused(dataclasses.replace(case, k=nan[0], v=nan[1]))
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
    out = fused(dataclasses.replace(case, **{name: broken}))
    assert out[0, 0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_that_leave_the_range_of_float16_stay_finite(dtype, device):
    case = make_case(48, device=device, dtype=dtype, num_heads=1)
    large = {name: (getattr(case, name).detach() * 500).requires_grad_() for name in "qkv"}
    case = dataclasses.replace(case, **large)
    assert_close(fused(case), case.expected(), TOLERANCE[dtype])
    gradients = torch.autograd.grad(fused(case).float().mean(), list(case.leaves().values()))
    assert all(g.isfinite().all() for g in gradients)
