"""Baselines, ceilings and compiled forms."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from slabformer.bench.ceiling import ProjectionsOnly, ceiling_of
from slabformer.deployment.compiled import Compiled
from slabformer.measure.timing import count_macs
from slabformer.models.weights.published import BY_MODEL
from slabformer.nn import PRepBN, RepBN
from slabformer.nn.affine import Folded
from small_models import images, trained_looking


@pytest.mark.parametrize("name", ["slab_deit_micro", "deit_micro_prepbn", "deit_micro"])
def test_ceiling_has_neither_norms_nor_attention(name: str) -> None:
    model = trained_looking(name)
    ceiling = ceiling_of(model)
    assert not any(isinstance(module, (PRepBN, RepBN, nn.LayerNorm)) for module in ceiling.modules())
    assert sum(isinstance(module, ProjectionsOnly) for module in ceiling.modules()) == 4
    assert sum(isinstance(module, Folded) for module in ceiling.modules()) == 9
    assert ceiling(images()).shape == model(images()).shape


def test_ceiling_keeps_every_projection() -> None:
    model = trained_looking("deit_micro")
    tokens = 17  # 4 x 4 patches and the class token
    linears = tokens * sum(layer.weight.numel() for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
    others = count_macs(model.patch_embed, (images(1),)) + model.head.weight.numel()
    assert count_macs(ceiling_of(model), (images(1),)) == linears + others


def test_ceiling_leaves_the_model_alone() -> None:
    model = trained_looking()
    before = copy.deepcopy(model)(images())
    ceiling_of(model)
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_ceiling_knows_timms_other_attentions(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    ceiling = ceiling_of(model)
    with torch.no_grad():
        assert ceiling(torch.randn(1, 3, 224, 224)).shape == (1, 3)
    assert not any(isinstance(module, nn.LayerNorm) for module in ceiling.modules())


@pytest.mark.parametrize("name", sorted(name for name in BY_MODEL if timm.is_model(name)))
def test_every_model_of_the_zoo_has_a_ceiling_that_costs_less(name: str) -> None:
    with torch.device("meta"):
        model, image = timm.create_model(name, num_classes=3).eval(), torch.empty(1, 3, 224, 224)
    ceiling = ceiling_of(model)
    assert ceiling(image).shape == (1, 3)
    blocks = sum(type(module).__name__.endswith("Block") for module in model.modules())
    assert sum(isinstance(module, ProjectionsOnly) for module in ceiling.modules()) == blocks
    assert not any(isinstance(module, (PRepBN, RepBN)) for module in ceiling.modules())
    assert count_macs(ceiling, (image,)) < count_macs(model, (image,))


def test_reduced_keys_and_values_are_projected_for_as_many_tokens() -> None:
    attention = timm.create_model("pvt_v2_b0").stages[0].blocks[0].attn
    tokens, width = torch.randn(1, 56 * 56, 32), 32
    macs = count_macs(ProjectionsOnly(attention), (tokens,))
    assert macs == width * width * (2 * 56 * 56 + 2 * 7 * 7)


def test_a_model_without_attention_has_no_ceiling() -> None:
    with pytest.raises(ValueError, match="no attention with proj and qkv"):
        ceiling_of(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))


@pytest.mark.slow
def test_more_models_compile_side_by_side_than_one_cache_holds() -> None:
    class Layer(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.factor).sin()

    x = torch.randn(4, 8)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for index in range(torch._dynamo.config.recompile_limit + 2):
            model = Layer(1.0 + index)
            assert torch.allclose(Compiled(model, torch.device("cpu"))(x), model(x), atol=1e-6)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled == torch._dynamo.config.recompile_limit + 2


def test_weights_are_frozen_into_the_program() -> None:
    model, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    program = Compiled(model, torch.device("cpu"))
    with torch.no_grad():
        before, other = program(x), program(x[:2])
        model.weight.zero_()
        assert torch.equal(program(x), before)
        assert torch.equal(program(x[:2]), other)
