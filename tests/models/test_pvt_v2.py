"""PVTv2 beside timm's; what it has in common with PVT is held in test_pvt*.py."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from slabformer.models.pvt_v2 import MapMlp
from slabformer.models.registry import baseline_of
from slabformer.nn.attention_variants import PyramidLinearAttention
from small_pvts import SMALL, images, small
from tolerances import ALGEBRA, EXACT, assert_close

SIZES = ["b0", "b1", "b2", "b3", *(pytest.param(size, marks=pytest.mark.slow) for size in ("b4", "b5"))]


@pytest.mark.parametrize("size", SIZES)
def test_timms_model_is_the_baseline_and_its_names_and_shapes_are_ours(size):
    name = f"slab_pvt_v2_{size}"
    assert baseline_of(name) == f"pvt_v2_{size}"
    with torch.device("meta"):
        ours, theirs = timm.create_model(name, attention="SSSS", norm="layernorm"), timm.create_model(baseline_of(name))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_with_layernorm_and_softmax_it_computes_what_timms_does():
    kwargs = {key: value for key, value in SMALL.items() if key != "img_size"}
    theirs = timm.create_model("pvt_v2_b0", **kwargs).double().eval()
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):  # timm's differ from one another
            module.eps = 1e-6
    ours = small("slab_pvt_v2_b0", attention="SSSS", norm="layernorm")
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours(images(96, 64)), theirs(images(96, 64)), ALGEBRA)
    for feature, expected in zip(
        ours.forward_intermediates(images(), intermediates_only=True),
        theirs.forward_intermediates(images(), intermediates_only=True),
        strict=True,
    ):
        assert_close(feature, expected, ALGEBRA)


def test_stages_end_in_a_norm_and_the_model_in_none_of_its_own():
    model = small("slab_pvt_v2_b0")
    ends = {}
    for i, stage in enumerate(model.stages):
        stage.norm.register_forward_hook(lambda _, __, out, i=i: ends.update({i: out}))
    features = model.forward_intermediates(images(), intermediates_only=True, output_fmt="NHWC")
    for i, feature in enumerate(features):
        assert_close(feature, ends[i], EXACT)
    assert isinstance(model.norm, nn.Identity)


def test_mlps_convolve_between_their_first_layer_and_the_activation():
    mlp = MapMlp(4, 6).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    hidden = mlp.dwconv(mlp.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_close(mlp(x), mlp.fc2(nn.functional.gelu(hidden)), ALGEBRA)


def test_convolutions_start_from_the_variance_of_their_fan_out():
    model = timm.create_model("slab_pvt_v2_b0", img_size=32)
    for weight, fan_out in (
        (model.patch_embed.proj.weight, 49 * 32),
        (model.stages[3].downsample.proj.weight, 9 * 256),
        (model.stages[3].blocks[0].mlp.dwconv.weight, 9),
    ):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_every_stage_attends_without_reduction_and_without_a_position_table():
    model = small("slab_pvt_v2_b0")
    attns = [block.attn for stage in model.stages for block in stage.blocks]
    assert {(type(attn), attn.sr_ratio) for attn in attns} == {(PyramidLinearAttention, 1)}
    assert not any(name.endswith("pos_embed") for name, _ in model.named_parameters())
