"""Costs told on the meta device are those of the model that fuse makes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from slabformer.measure.cost import cost_of
from slabformer.measure.timing import count_macs, count_parameters

SMALL = {"img_size": 64, "num_classes": 3}
FAMILIES = [
    ("slab_deit_micro", {}),
    ("deit_micro_prepbn", {}),
    pytest.param("slab_swin_tiny", {**SMALL, "depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
    pytest.param("slab_pvt_tiny", {**SMALL, "depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
    pytest.param("slab_pvt_v2_b0", {**SMALL, "depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
    pytest.param("slab_cswin_tiny", {**SMALL, "depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "arguments"), FAMILIES)
def test_deployed_costs_are_those_of_the_fused_model(name: str, arguments: dict) -> None:
    model = timm.create_model(name, **arguments).eval()
    with torch.device("meta"):
        on_meta = timm.create_model(name, **arguments)
    size = arguments.get("img_size", 32)
    image = torch.randn(1, 3, size, size)
    told = cost_of(on_meta, image.to("meta"))
    fused, _ = sf.fuse(model, image, allow_gamma=True)
    assert (told.parameters, told.macs) == (count_parameters(model), count_macs(model, (image,)))
    assert (told.deployed_parameters, told.deployed_macs) == (count_parameters(fused), count_macs(fused, (image,)))


def test_layers_without_bias_behind_a_norm_get_one() -> None:
    model = nn.Sequential(sf.RepBN(4), nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    told = cost_of(model.to("meta"), torch.empty(1, 3, 4, device="meta"))
    assert told.deployed_parameters == 24 + 6 + 12


def test_a_model_without_our_norms_costs_the_same_in_both_forms() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    told = cost_of(model, torch.zeros(1, 4))
    assert told.deployed_parameters == told.parameters == 18
