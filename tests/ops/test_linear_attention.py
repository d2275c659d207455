from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slabformer.ops.dispatch import has_kernel
from slabformer.ops.linear_attention import cheaper_order, linear_attention
from slabformer.ops.reference import linear_attention_reference
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close

HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}  # a few units in the last place of either format
SHAPES = [(1, 1, 8, 8), (7, 7, 8, 8), (197, 197, 16, 16), (7, 197, 16, 8), (197, 7, 8, 24)]


def tensors(N: int, M: int, D: int, E: int, dtype=torch.float64, B: int = 2, num_heads: int = 3):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, num_heads, N, D), (B, num_heads, M, D), (B, num_heads, M, E))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def assert_error_below(tolerance: float, actual, expected, v) -> None:
    error = (actual.detach() - expected.detach()).abs().max() / v.detach().double().square().mean().sqrt()
    assert error <= tolerance


def key_mask(B: int, M: int) -> torch.Tensor:
    mask = torch.arange(M).expand(B, M) % 3 != 1
    mask[0, M // 2 :] = False
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_reference(shape, masked, order):
    q, k, v = tensors(*shape)
    mask = key_mask(2, shape[1]) if masked else None
    eps = 0.1  # with a single key and an eps near 0 the output hardly depends on q, and its gradient is all rounding
    expected = linear_attention_reference(q, k, v, mask=mask, eps=eps)
    actual = linear_attention(q, k, v, mask=mask, order=order, eps=eps)
    assert_close(actual, expected, ALGEBRA)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, ours, theirs in zip(
        "qkv",
        torch.autograd.grad((actual * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert ours.isfinite().all(), name
        assert_close(ours, theirs, ALGEBRA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_shorter_dtypes_follow_the_reference(dtype, order):
    q, k, v = tensors(197, 197, 32, 32, dtype)
    actual = linear_attention(q, k, v, order=order)
    assert actual.dtype == dtype
    assert_close(actual, linear_attention_reference(q, k, v), HALF.get(dtype, FLOAT32))


@settings(max_examples=40)
@given(*[st.integers(1, 40)] * 2, *[st.integers(1, 12)] * 2, *[st.integers(1, 3)] * 2)
def test_both_orders_agree_on_any_shape(N, M, D, E, B, num_heads):
    q, k, v = tensors(N, M, D, E, B=B, num_heads=num_heads)
    assert_close(linear_attention(q, k, v, order="linear"), linear_attention(q, k, v, order="quadratic"), ALGEBRA)


@pytest.mark.parametrize(
    ("N", "M", "D", "order"),
    [(196, 196, 64, "linear"), (49, 49, 64, "quadratic"), (16384, 16384, 32, "linear"), (1, 196, 64, "quadratic")],
)
def test_the_order_with_fewer_products_is_taken(N, M, D, order):
    q, v = torch.empty(1, 1, N, D, device="meta"), torch.empty(1, 1, M, D, device="meta")
    assert cheaper_order(q, v) == order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.02, 1.0, 8.0])
def test_half_precision_survives_16384_tokens(dtype, scale):
    q, k, v = (t.detach().mul(scale).requires_grad_() for t in tensors(16384, 16384, 32, 32, dtype, B=1, num_heads=2))
    actual = linear_attention(q, k, v)
    expected = linear_attention(q.double(), k.double(), v.double())
    # a mean over 16384 values of random sign is small against the rounding of each
    assert_error_below(HALF[dtype], actual, expected, v)
    gradients = torch.autograd.grad(actual.float().square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_but_precision(dtype):
    q, k, v = tensors(4096, 4096, 16, 16, torch.float32, B=1, num_heads=1)
    k, v = k * 8, v * 8 + 8  # sums over tokens leave float16's range
    with torch.autocast("cpu", dtype):
        actual = linear_attention(q, k, v)
    assert actual.dtype == torch.float32
    assert_close(actual, linear_attention_reference(q, k, v), HALF[dtype])


def test_masked_keys_count_as_absent_whatever_they_hold():
    q, k, v = (t.detach() for t in tensors(9, 12, 8, 8))
    mask = torch.arange(12).expand(2, 12) < 5
    for tensor in (k, v):
        tensor[:, :, 5:] = float("nan")
    k.requires_grad_()
    out = linear_attention(q, k, v, mask=mask)
    assert_close(out, linear_attention(q, k[:, :, :5], v[:, :, :5]), ALGEBRA)
    (gradient,) = torch.autograd.grad(out.sum(), k)
    assert_close(gradient[:, :, 5:], torch.zeros(2, 3, 7, 8, dtype=torch.float64), EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("dead", ["queries", "keys", "mask"])
def test_queries_that_meet_no_key_give_zero(dead, order, dtype):
    q, k, v = (t.detach() for t in tensors(7, 7, 8, 8, dtype))
    q = -q.abs() if dead == "queries" else q
    k = -k.abs() if dead == "keys" else k
    mask = torch.zeros(2, 7, dtype=torch.bool) if dead == "mask" else None
    assert_close(linear_attention(q, k, v, mask=mask, order=order), torch.zeros_like(q), EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_table_is_added_to_the_keys(dtype):
    q, k, v = tensors(7, 9, 8, 8, dtype)
    table = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    expected = linear_attention(q, k + table.to(dtype), v)
    assert_close(linear_attention(q, k, v, table=table), expected, EXACT)


def test_token_major_views_need_no_copy_by_the_caller():
    q, k, v = tensors(7, 7, 8, 8)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert_close(linear_attention(*strided), linear_attention(q, k, v), EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "needs \\(B, num_heads, N, D\\)"),
        (lambda q, k, v: (q, k[..., :4], v), "q and k of one width"),
        (lambda q, k, v: (q, k, v[:, :, :3]), "k and v of one length"),
        (lambda q, k, v: (q[:1], k, v), "q and k of one width"),
    ],
    ids=["dimensions", "width", "length", "batch"],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(*change(*tensors(7, 7, 8, 8)))


def test_tables_masks_and_orders_that_mean_nothing_are_refused():
    q, k, v = tensors(7, 7, 8, 8)
    with pytest.raises(ValueError, match=r"a table of shape \(1, 3, 7, 8\)"):
        linear_attention(q, k, v, table=torch.ones(1, 7, 24))
    with pytest.raises(ValueError, match=r"boolean mask of shape \(2, 7\)"):
        linear_attention(q, k, v, mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"boolean mask of shape \(2, 7\)"):
        linear_attention(q, k, v, mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="order must be one of"):
        linear_attention(q, k, v, order="cubic")


@pytest.mark.slow
def test_compiles_in_one_graph_with_the_same_numbers():
    q, k, v = tensors(197, 50, 16, 16)
    mask = key_mask(2, 50)
    torch._dynamo.reset()
    compiled = torch.compile(linear_attention, fullgraph=True)
    expected = linear_attention(q, k, v, mask=mask)
    assert_close(compiled(q, k, v, mask=mask), expected, ALGEBRA)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(q, k, v, mask=mask).square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(ours, theirs, ALGEBRA)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_survives_16384_tokens_on_a_gpu(dtype):
    q, k, v = (t.detach().cuda().mul(8).requires_grad_() for t in tensors(16384, 16384, 64, 64, dtype))
    actual = linear_attention(q, k, v)
    expected = linear_attention(q.double(), k.double(), v.double())
    assert_error_below(HALF[dtype], actual, expected, v)
    assert all(g.isfinite().all() for g in torch.autograd.grad(actual.float().square().sum(), (q, k, v)))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")  # said by Triton 3.9 to every caller
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_takes_the_kernels_and_follows_the_reference(dtype, compiled):
    q, k, v = (t.detach().cuda().requires_grad_() for t in tensors(197, 197, 32, 32, dtype))
    assert has_kernel(q, k, v)
    torch._dynamo.reset()
    call = torch.compile(linear_attention, fullgraph=True) if compiled else linear_attention
    actual, expected = call(q, k, v), linear_attention_reference(q, k, v)
    assert_close(actual, expected, 2 * HALF.get(dtype, FLOAT32))
    weight = torch.randn(expected.shape, device="cuda", dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((actual.double() * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        # gradients of queries with a small normaliser are tens of times the scale
        assert_close(ours, theirs, 10 * HALF.get(dtype, FLOAT32))


@pytest.mark.gpu
def test_an_exported_program_keeps_the_operator_on_a_gpu():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v)

    q, k, v = (t.detach().cuda() for t in tensors(197, 197, 32, 32, torch.bfloat16))
    program = torch.export.export(Attention(), (q, k, v))
    assert "slabformer.linear_attention" in program.graph_module.code
