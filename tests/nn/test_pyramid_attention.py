"""Spatial reduction of keys and values, under softmax and linear attention alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusing import ready
from slabformer.nn.attention_variants import PyramidAttention, PyramidLinearAttention
from slabformer.nn.resample import resample_table
from slabformer.ops.reference import linear_attention_reference
from tolerances import ALGEBRA, EXACT, assert_close

C, HEADS = 12, 3
both = pytest.mark.parametrize("kind", [PyramidAttention, PyramidLinearAttention])


def attention(kind: type[nn.Module], sr_ratio: int = 2, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return ready(kind(C, HEADS, sr_ratio, **kwargs))


def tokens(N: int) -> Tensor:
    return torch.randn(2, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def keys_and_values(module: nn.Module, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """From patches cut by hand: ``(B, num_heads, M, D)`` each."""
    r = module.sr_ratio
    rows, columns = grid[0] // r, grid[1] // r
    patches = x.view(2, *grid, C)[:, : rows * r, : columns * r].reshape(2, rows, r, columns, r, C)
    weight = module.sr.weight.permute(2, 3, 1, 0)
    reduced = module.norm(torch.einsum("bircsk,rsko->bico", patches, weight) + module.sr.bias)
    k, v = module.kv(reduced.flatten(1, 2)).chunk(2, dim=-1)
    return tuple(t.view(2, -1, HEADS, C // HEADS).transpose(1, 2) for t in (k, v))


def queries(module: nn.Module, x: Tensor) -> Tensor:
    return module.q(x).view(2, -1, HEADS, C // HEADS).transpose(1, 2)


def projected(module: nn.Module, heads: Tensor) -> Tensor:
    return module.proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 3)], ids=str)
def test_softmax_attention_equals_its_formula(grid):
    module, x = attention(PyramidAttention), tokens(grid[0] * grid[1])
    k, v = keys_and_values(module, x, grid)
    weights = (queries(module, x) @ k.transpose(2, 3) / (C // HEADS) ** 0.5).softmax(-1)
    assert_close(module(x, grid_size=grid), projected(module, weights @ v), ALGEBRA)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 3)], ids=str)
def test_linear_attention_stretches_values_over_the_grid(grid):
    module, x = attention(PyramidLinearAttention, grid_size=(4, 4)), tokens(grid[0] * grid[1])
    k, v = keys_and_values(module, x, grid)
    reduced = (grid[0] // 2, grid[1] // 2)
    (table,) = module.heads(resample_table(module.positional_encoding, (2, 2), reduced))
    maps = nn.functional.interpolate(v.flatten(0, 1).transpose(1, 2).unflatten(2, reduced), grid, mode="bilinear")
    local = module.dwc(maps).flatten(2).transpose(1, 2).unflatten(0, (2, HEADS))
    expected = linear_attention_reference(queries(module, x), k + table, v) + local
    assert_close(module(x, grid_size=grid), projected(module, expected), ALGEBRA)


@both
def test_what_fills_no_patch_is_no_key(kind):
    module, x = attention(kind), tokens(35)
    x.requires_grad_()
    out = module(x, grid_size=(7, 5)).view(2, 7, 5, C)
    (gradient,) = torch.autograd.grad(out[:, 0, 0].square().sum(), x)
    touched = gradient.view(2, 7, 5, C).abs().sum((0, 3)) > 0
    assert touched[:6, :4].all()
    assert not touched[6].any()
    assert not touched[:, 4].any()


@both
def test_a_grid_smaller_than_a_patch_is_refused_in_one_line(kind):
    module = attention(kind, sr_ratio=4, **({"grid_size": (8, 8)} if kind is PyramidLinearAttention else {}))
    with pytest.raises(ValueError, match="a grid of 3x5 cannot be reduced by sr_ratio 4"):
        module(tokens(15), grid_size=(3, 5))


@both
def test_tokens_without_a_grid_are_taken_as_a_square_or_refused(kind):
    module = attention(kind)
    assert_close(module(tokens(36)), module(tokens(36), grid_size=(6, 6)), EXACT)
    with pytest.raises(ValueError, match="15 tokens form no square grid"):
        module(tokens(15))


def test_softmax_attention_without_reduction_needs_no_grid():
    assert attention(PyramidAttention, sr_ratio=1)(tokens(15)).shape == (2, 15, C)


def test_set_grid_size_is_told_the_grid_of_the_input():
    module, x = attention(PyramidLinearAttention, grid_size=(8, 8)), tokens(24)
    expected = module(x, grid_size=(4, 6))
    module.set_grid_size((4, 6))
    assert module.positional_encoding.shape == (1, 6, C)
    assert_close(module(x), expected, EXACT)


def test_ways_of_stretching_agree_where_nothing_is_reduced_and_differ_elsewhere():
    one, two = (attention(PyramidLinearAttention, 1, grid_size=(4, 4), resize=how) for how in ("1d", "2d"))
    assert_close(one(tokens(16)), two(tokens(16)), EXACT)
    one, two = (attention(PyramidLinearAttention, grid_size=(4, 4), resize=how) for how in ("1d", "2d"))
    assert (one(tokens(16)) - two(tokens(16))).abs().max() > 1e-3


@both
@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_every_parameter_gets_a_gradient(kind, sr_ratio):
    module = attention(kind, sr_ratio, qkv_bias=False).train()
    module(tokens(16)).square().sum().backward()
    used = {name: p.grad for name, p in module.named_parameters() if ".norm." not in f".{name}" or "rep" in name}
    assert [name for name, gradient in used.items() if gradient is None or not gradient.any()] == []


def test_weights_are_dropped_in_training_alone():
    module, x = attention(PyramidAttention, attn_drop=0.5), tokens(16)
    assert_close(module(x), module(x), EXACT)
    module.train()
    assert (module(x) - module(x)).abs().max() > 1e-3
