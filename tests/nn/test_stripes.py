from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redrawn import redrawn
from slabformer.nn.stripes import StripeAttention, WindowLinearAttention
from tolerances import ALGEBRA, EXACT, assert_close

C, HEADS = 12, 3


def tokens(N: int, seed: int) -> Tensor:
    return torch.randn(2, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def naive(module: StripeAttention, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention over the whole map with every other stripe masked; LePE stripe by stripe."""
    (H, W), width = grid, module.width or max(grid)
    place = torch.arange(H).repeat_interleave(W) if module.axis == 0 else torch.arange(W).repeat(H)
    stripe = place // width
    q, k, heads = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(stripe[:, None] != stripe, -torch.inf)
    out = (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)
    maps = v.unflatten(1, grid).permute(0, 3, 1, 2)
    local = [module.get_v(part) for part in maps.split(width, 2 + module.axis)]
    return out + torch.cat(local, 2 + module.axis).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("direction", ["vertical", "horizontal"])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 2), (1, 8)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, None])
def test_tokens_meet_in_their_stripe_alone_narrower_last_ones_included(width, grid, direction):
    module = redrawn(StripeAttention(C, HEADS, width, direction), std=0.5)
    qkv = [tokens(grid[0] * grid[1], seed) for seed in range(3)]
    actual, expected = module(*qkv, grid), naive(module, *qkv, grid)
    assert_close(actual, expected, ALGEBRA)
    weights = tokens(grid[0] * grid[1], 3).detach()
    sources = [*qkv, *module.parameters()]
    gradients = [torch.autograd.grad((out * weights).sum(), sources) for out in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "dim must be a multiple of num_heads, got 12 and 5"),
        ({"width": 0}, "stripes need a width of 1 or more, or None for the whole map, got 0"),
        ({"direction": "diagonal"}, "direction must be one of .*, got 'diagonal'"),
    ],
    ids=["heads", "width", "direction"],
)
def test_stripes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StripeAttention(**{"dim": C, "num_heads": HEADS, **arguments})


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_one_convolution_does_what_the_shared_kernels_and_lepe_do(kernel_size):
    module = redrawn(WindowLinearAttention(C, HEADS, (3, 4), kernel_size=kernel_size), std=0.5)
    q, k, v = (tokens(24, seed) for seed in range(3))
    with torch.no_grad():
        local = module(q - 1e4, k, v, (6, 4))  # no query: nothing but the convolutions
    maps = v.unflatten(1, (2, 3, 4)).flatten(0, 1).permute(0, 3, 1, 2)  # windows are bands of three rows
    shared = torch.cat([module.dwc(head) for head in maps.chunk(HEADS, 1)], 1)
    expected = (shared + module.get_v(maps)).permute(0, 2, 3, 1).reshape(2, 24, C)
    assert_close(local, expected, ALGEBRA)


def test_a_table_made_for_other_windows_is_resampled():
    module = redrawn(WindowLinearAttention(C, HEADS, (3, 4)), std=0.5)
    qkv = [tokens(24, seed) for seed in range(3)]
    expected = module(*qkv, (6, 4), (2, 2))
    module.set_grid_size((2, 2))
    assert_close(module(*qkv, (6, 4)), expected, EXACT)


def test_half_precision_stays_near_float64():
    module = redrawn(StripeAttention(C, HEADS, 3), std=0.5)
    qkv = [tokens(35, seed) for seed in range(3)]
    expected = module(*qkv, (5, 7))
    actual = module.to(torch.bfloat16)(*(t.to(torch.bfloat16) for t in qkv), (5, 7))
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected, 5e-2)  # some units in the last of eight bits
