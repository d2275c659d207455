"""Operators that torch's counter does not know count as the products that they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from slabformer.measure.flops import FORMULAS, flop_counter, is_counted
from slabformer.measure.roofline import work_of
from slabformer.measure.timing import count_macs

B, N, M, D, E, HEADS = 2, 5, 7, 8, 8, 3


def heads(tokens: int, width: int, num_heads: int = HEADS) -> Tensor:
    return torch.randn(B, num_heads, tokens, width)


def flops(call, *inputs: Tensor, **arguments: object) -> int:
    with flop_counter() as counter:
        call(*inputs, **arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("key_heads", [HEADS, 1], ids=["own-keys", "shared-keys"])
@torch.no_grad()
def test_attention_counts_scores_and_weighted_sums(masked: bool, key_heads: int) -> None:
    q, k, v = heads(N, D), heads(M, D, key_heads), heads(M, E, key_heads)
    mask = torch.zeros(B, 1, N, M) if masked else None
    counted = flops(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=True)
    assert counted == 2 * B * HEADS * N * M * (D + E)


def test_attention_counts_alike_whichever_kernel_runs() -> None:
    q, k, v = (heads(N, D).requires_grad_() for _ in range(3))

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    def forward() -> None:
        F.scaled_dot_product_attention(q, k, v)

    with sdpa_kernel(SDPBackend.MATH):
        explicit, explicit_forward = flops(step), flops(forward)
    assert flops(forward) == explicit_forward
    recomputed = 2 * B * HEADS * N * N * D  # the fused backward computes the scores again
    assert flops(step) == explicit + recomputed


@torch.no_grad()
def test_a_roofline_counts_what_attention_reads_and_writes() -> None:
    q, k, v = heads(N, D), heads(N, D), heads(N, D)
    assert work_of(F.scaled_dot_product_attention, q, k, v).bytes >= 4 * 4 * q.numel()


MODULES = {
    "self-attention": lambda: nn.MultiheadAttention(12, 3, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True),
    "encoder-pre-norm": lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_torch_s_fast_paths_count_as_the_slow_ones(name: str) -> None:
    module = MODULES[name]().eval()
    x = torch.randn(B, N, 12)
    inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        slow = count_macs(module, inputs)
        torch.backends.mha.set_fastpath_enabled(True)
        assert count_macs(module, inputs) == slow > 0
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_an_lstm_counts_its_products(bidirectional: bool) -> None:
    lstm = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)
    products = sum(weight.numel() for name, weight in lstm.named_parameters() if name.startswith("weight"))
    assert count_macs(lstm, (torch.randn(B, N, 6),)) == B * N * products


@torch.no_grad()
def test_products_with_vectors_count() -> None:
    matrix, vector = torch.randn(4, 6), torch.randn(6)
    assert flops(torch.mv, matrix, vector) == flops(torch.addmv, torch.randn(4), matrix, vector) == 2 * 4 * 6
    assert flops(torch.dot, vector, vector) == 2 * 6


@torch.no_grad()
def test_integer_products_count() -> None:
    one, other = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 24, dtype=torch.int8)
    assert flops(torch._int_mm, one, other) == 2 * 32 * 16 * 24


def test_every_formula_has_an_operator_that_is_counted() -> None:
    assert all(is_counted(operator) for operator in FORMULAS)
    assert is_counted(torch.ops.aten.mm)
    assert not is_counted(torch.ops.aten.add)
