"""Models rewritten for engines: the same function, the original left alone, and what stays as it is."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from redrawn import redrawn
from slabformer.export.heads_first import HeadsFirstAttention
from slabformer.export.map_form import MapBlock, map_form
from slabformer.export.token_form import TokenBlock, TokenLinear
from slabformer.nn import SimplifiedLinearAttention
from slabformer.nn.attention import LinearAttentionCore
from small_pvts import SMALL as SMALL_PVT

SMALL_CSWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
SMALL_SWIN = {"embed_dim": 24, "num_heads": (2, 2, 2, 2), "depths": (2, 2, 2, 2)}


def made(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": (64, 96), **options}).eval()
    sf.testing.randomize_norms_(model)
    return model


CASES = {
    "tokens": ("slab_deit_micro", {}, {HeadsFirstAttention: 4, MapBlock: 4}),
    "windows": ("slab_swin_tiny", SMALL_SWIN, {HeadsFirstAttention: 4, MapBlock: 8, TokenLinear: 3}),
    "pyramid": ("slab_pvt_tiny", SMALL_PVT, {HeadsFirstAttention: 5, MapBlock: 5}),
    "reduced": (
        "slab_pvt_tiny",
        {**SMALL_PVT, "linear_sr_ratios": (2, 2, 1, 1)},
        {HeadsFirstAttention: 2, MapBlock: 5},
    ),
    "convolutions in MLPs": ("slab_pvt_v2_b0", {"depths": (1, 1, 1, 1)}, {HeadsFirstAttention: 4, MapBlock: 4}),
    "stripes": ("slab_cswin_tiny", SMALL_CSWIN, {MapBlock: 4}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_models_without_norms_compute_the_same_on_maps_and_the_original_stays(
    case: tuple[str, dict[str, object], dict[type[nn.Module], int]],
) -> None:
    name, options, expected = case
    images = torch.randn(2, 3, 64, 96)
    model, _ = sf.fuse(made(name, **options), images, allow_gamma=True)
    form = map_form(model)
    sf.verify(model, form, images)
    for kind in (HeadsFirstAttention, MapBlock, TokenLinear, TokenBlock):
        found = sum(isinstance(module, kind) for module in form.modules())
        assert found == expected.get(kind, 0)
        assert not any(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(("normed", "kind"), [(True, MapBlock), (False, TokenBlock)])
@torch.no_grad()
def test_norms_that_stay_read_channels_last(normed: bool, kind: type[nn.Module]) -> None:
    model = made("slab_swin_tiny", **SMALL_SWIN, norm="layernorm")
    form = map_form(model, normed)
    sf.verify(model, form, torch.randn(2, 3, 64, 96))
    assert sum(type(module) is kind for module in form.modules()) == 8


def attention_of(**kwargs: object) -> SimplifiedLinearAttention:
    return redrawn(SimplifiedLinearAttention(24, 3, grid_size=(4, 6), **kwargs), std=1)


@pytest.mark.parametrize(
    "kwargs", [{}, {"qkv_bias": False, "proj_bias": False, "kernel_size": 3}], ids=["bias", "bare"]
)
@pytest.mark.parametrize("grid", [(4, 6), (5, 3)], ids=["own grid", "another"])
@torch.no_grad()
def test_tokens_come_out_the_same(kwargs: dict[str, object], grid: tuple[int, int]) -> None:
    attention = attention_of(**kwargs)
    x = torch.randn(2, grid[0] * grid[1], 24)
    expected = attention.double()(x.double(), grid_size=grid)
    actual = HeadsFirstAttention(attention)(x.double(), grid_size=grid)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_masks_are_refused_and_half_precision_stays() -> None:
    x, mask = torch.randn(1, 24, 24), torch.ones(1, 24, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no mask"):
        HeadsFirstAttention(attention_of())(x, attn_mask=mask)
    half = map_form(nn.Sequential(attention_of()).bfloat16())
    assert isinstance(half[0], LinearAttentionCore)
