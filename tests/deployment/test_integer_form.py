"""Models rewritten for integers: what they compute, and what is rewritten."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from slabformer.deployment.integer_attention import IntegerLinearAttention
from slabformer.deployment.integer_form import TokenBlock, TokenLinear, integer_form
from slabformer.nn import SimplifiedLinearAttention


def deit() -> nn.Module:
    return timm.create_model("slab_deit_micro", img_size=64)


def swin() -> nn.Module:
    return timm.create_model("slab_swin_tiny", img_size=64, embed_dim=24, num_heads=(2, 2, 2, 2), depths=(2, 2, 2, 2))


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
