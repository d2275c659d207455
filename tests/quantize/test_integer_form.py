"""Models rewritten for integers: what they compute, and what is rewritten."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from slabformer.export.gathered_windows import GatheredWindowAttention
from slabformer.export.token_form import TokenBlock, TokenLinear
from slabformer.nn import SimplifiedLinearAttention
from slabformer.nn.shifted_windows import ShiftedWindowAttention
from slabformer.quantize.integer_attention import IntegerLinearAttention
from slabformer.quantize.integer_form import integer_form


def deit() -> nn.Module:
    return timm.create_model("slab_deit_micro", img_size=64)


def swin(img_size: int = 64, window_size: int = 7) -> nn.Module:
    small = {"embed_dim": 24, "num_heads": (2, 2, 2, 2), "depths": (2, 2, 2, 2)}
    return timm.create_model("slab_swin_tiny", img_size=img_size, window_size=window_size, **small)


@pytest.mark.parametrize(("make", "blocks", "merges"), [(deit, 0, 0), (swin, 8, 3)], ids=["tokens", "maps"])
@torch.no_grad()
def test_models_compute_the_same_and_the_original_stays(make: type[nn.Module], blocks: int, merges: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    sf.testing.randomize_norms_(model)
    form = integer_form(model)
    sf.verify(model, form, torch.randn(2, 3, 64, 64))
    for kind, count in {IntegerLinearAttention: 4, TokenBlock: blocks, TokenLinear: merges}.items():
        assert sum(isinstance(module, kind) for module in form.modules()) == count
        assert not any(isinstance(module, kind) for module in model.modules())
    assert not any(type(module) is SimplifiedLinearAttention for module in form.modules())


@pytest.mark.parametrize("image_size", [128, 96, 120], ids=["kept", "other", "padded"])
@pytest.mark.parametrize("window_size", [4, 5], ids=["tiled", "untiled"])
@torch.no_grad()
def test_shifted_windows_are_gathered_where_they_tile_the_map_and_the_same_everywhere(
    window_size: int, image_size: int
) -> None:
    torch.manual_seed(0)
    model = swin(img_size=128, window_size=window_size).eval()
    form = integer_form(model)
    gathered = [module for module in form.modules() if isinstance(module, GatheredWindowAttention)]
    assert [module.tiled for module in gathered] == [window_size == 4] * 2 + [True] * 2  # the last map is one window
    assert any(any(module.windows.shift) for module in gathered)
    assert len(gathered) == sum(type(module) is ShiftedWindowAttention for module in model.modules())
    sf.verify(model, form, torch.randn(2, 3, image_size, image_size))
