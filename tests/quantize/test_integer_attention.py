"""Linear attention rewritten for integers: the same function of the same tokens, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from redrawn import redrawn
from slabformer.nn import SimplifiedLinearAttention
from slabformer.quantize.integer_attention import IntegerLinearAttention


def attention_of(**kwargs: object) -> SimplifiedLinearAttention:
    return redrawn(SimplifiedLinearAttention(24, 3, grid_size=(4, 6), **kwargs), std=1)


@pytest.mark.parametrize(
    "kwargs", [{}, {"qkv_bias": False, "proj_bias": False, "kernel_size": 3}], ids=["bias", "bare"]
)
@pytest.mark.parametrize("grid", [(4, 6), (5, 3)], ids=["own grid", "another"])
@torch.no_grad()
def test_tokens_come_out_the_same(kwargs: dict[str, object], grid: tuple[int, int]) -> None:
    attention = attention_of(**kwargs)
    x = torch.randn(2, grid[0] * grid[1], 24, dtype=torch.float64)
    expected = attention(x, grid_size=grid)
    torch.testing.assert_close(IntegerLinearAttention(attention)(x, grid_size=grid), expected, rtol=1e-10, atol=1e-10)


def test_masks_are_refused() -> None:
    x, mask = torch.randn(1, 24, 24, dtype=torch.float64), torch.ones(1, 24, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no mask"):
        IntegerLinearAttention(attention_of())(x, attn_mask=mask)
