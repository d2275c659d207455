"""Models rewritten for engines: the same function, the original left alone, and what stays as it is."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from redrawn import redrawn
from slabformer.export.heads_first import HeadsFirstAttention
from slabformer.export.token_form import FLOAT_FORMS, TokenBlock, TokenLinear, token_form
from slabformer.nn import SimplifiedLinearAttention
from slabformer.nn.attention import LinearAttentionCore
from small_pvts import SMALL as SMALL_PVT

SMALL_SWIN = {"embed_dim": 24, "num_heads": (2, 2, 2, 2), "depths": (2, 2, 2, 2)}


def made(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 64, **options}).eval()
    sf.testing.randomize_norms_(model)
    return model


@pytest.mark.parametrize(
    ("name", "options", "attentions", "blocks", "merges"),
    [
        ("slab_deit_micro", {}, 4, 0, 0),
        ("slab_swin_tiny", SMALL_SWIN, 4, 8, 3),
        ("slab_pvt_tiny", SMALL_PVT, 5, 5, 0),
        ("slab_pvt_tiny", {**SMALL_PVT, "linear_sr_ratios": (2, 2, 1, 1)}, 2, 5, 0),
    ],
    ids=["tokens", "windows", "pyramid", "reduced"],
)
@torch.no_grad()
def test_models_compute_the_same_and_the_original_stays(
    name: str, options: dict[str, object], attentions: int, blocks: int, merges: int
) -> None:
    model = made(name, **options)
    form = token_form(model, FLOAT_FORMS)
    sf.verify(model, form, torch.randn(2, 3, 64, 64))
    for kind, count in {HeadsFirstAttention: attentions, TokenBlock: blocks, TokenLinear: merges}.items():
        assert sum(isinstance(module, kind) for module in form.modules()) == count
        assert not any(isinstance(module, kind) for module in model.modules())


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
    half = token_form(nn.Sequential(attention_of()).bfloat16(), FLOAT_FORMS)
    assert isinstance(half[0], LinearAttentionCore)
