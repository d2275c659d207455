"""Swin: published sizes, timm's outputs, training, fusing, and settings that cannot be."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import fusing
from backbones import (
    assert_checkpointing_changes_nothing,
    assert_groups_cover_every_parameter_once,
    decayed_names,
    matrix_names,
)
from slabformer import PRepBN, RepBN, SimplifiedLinearAttention, testing
from slabformer.models.registry import baseline_of
from slabformer.models.weights.published import PUBLISHED
from slabformer.nn.shifted_windows import ShiftedWindowAttention
from small_swins import NAMES, SIZES, SMALL, create, each_plan, images
from tolerances import ALGEBRA, assert_close

CONFIGS = [config for config, row in PUBLISHED.items() if row.model in NAMES]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_as_many_as_published(config):
    row = PUBLISHED[config]
    with torch.device("meta"):
        model = timm.create_model(row.model, norm=row.norm)
    assert sum(p.numel() for p in model.parameters()) == row.num_params
    assert model.attention == row.attention


@pytest.mark.parametrize("name", NAMES)
def test_baselines_are_of_the_same_shape(name):
    with torch.device("meta"):
        model = timm.create_model(name, norm="layernorm", attention="SSSS")
        baseline = timm.create_model(str(baseline_of(name)))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in baseline.parameters())


def timms(model: nn.Module, **kwargs) -> SwinTransformer:
    """timm's Swin with the weights of ``model``, which has LayerNorm and softmax throughout."""
    reference = SwinTransformer(**kwargs)
    state = {name.replace("stages.", "layers."): value for name, value in model.state_dict().items()}
    reference.load_state_dict({name.replace("head.", "head.fc."): value for name, value in state.items()})
    return reference.double().eval()


def test_softmax_stages_equal_timms_where_nothing_is_padded():
    shape = {**SMALL, "img_size": 128, "window_size": 4, "num_classes": 10}
    model = testing.randomize_norms_(timm.create_model("slab_swin_tiny", attention="SSSS", norm="layernorm", **shape))
    reference, x = timms(model, **shape), images(128, 128)
    assert_close(model.double().eval()(x), reference(x), ALGEBRA)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_published_models_take_published_images(name):
    model = timm.create_model(name).eval()
    assert model.pretrained_cfg["architecture"] == name
    testing.randomize_norms_(model)
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    assert logits.std(0).min() > 0


@each_plan
def test_the_head_is_reset_as_timms_users_expect(attention):
    model = create(attention, num_classes=3, in_chans=1)
    x = images()[:, :1]
    assert model(x).shape == (2, 3)
    model.reset_classifier(5)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 64)


@pytest.mark.parametrize("fixed_windows", [False, True], ids=["whole_map", "fixed"])
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(fixed_windows):
    assert_checkpointing_changes_nothing(lambda: create(fixed_windows=fixed_windows), images(50, 60))


def test_position_tables_of_linear_attention_are_decayed_and_relative_ones_are_not():
    model = create()
    decayed, matrices = decayed_names(model), matrix_names(model)
    assert "stages.0.blocks.0.attn.positional_encoding" in decayed
    assert decayed == {name for name in matrices if not name.endswith("relative_position_bias_table")}
    assert len(matrices - decayed) == 3


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_cover_every_parameter_once(coarse):
    assert_groups_cover_every_parameter_once(create(), coarse)


@each_plan
def test_the_plan_is_what_stages_hold(attention):
    kinds = {"S": ShiftedWindowAttention, "L": SimplifiedLinearAttention}
    for letter, stage in zip(attention, create(attention).stages, strict=True):
        assert {type(block.attn) for block in stage.blocks} == {kinds[letter]}


@pytest.mark.parametrize(("norm", "kind"), [("prepbn", PRepBN), ("repbn", RepBN), ("layernorm", nn.LayerNorm)])
def test_norms_have_names_and_published_epsilons(norm, kind):
    model = create(norm=norm)
    norms = [model.norm, model.patch_embed.norm]
    for stage in model.stages:
        norms += [norm for block in stage.blocks for norm in (block.norm1, block.norm2)]
        norms += [stage.downsample.norm] if stage is not model.stages[0] else []
    assert {type(norm) for norm in norms} == {kind}
    assert len(norms) == 2 + 2 * 5 + 3
    epsilons = {(type(m), m.eps) for m in model.modules() if isinstance(m, (RepBN, nn.LayerNorm))}
    assert epsilons <= {(RepBN, 1e-5), (nn.LayerNorm, 1e-5)}


@pytest.mark.parametrize("attention", ["SSSS", "LLSS"])
def test_half_precision_stays_near(attention):
    model, x = create(attention), images(50, 60)
    expected = model(x)
    actual = model.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    # five blocks of some units in the last place each, on norms that were drawn at random
    assert_close(actual, expected, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "LLS"}, "attention needs one letter for each of 4 stages, got 'LLS'"),
        ({"attention": "LLXS"}, "unknown letter 'X' in attention 'LLXS'"),
        ({"num_heads": (3, 6)}, r"num_heads needs a number for each of 4 stages, got \(3, 6\)"),
        ({"num_heads": (3, 6, 12, 24)}, r"num_heads\[0\] must divide the 8 channels of its stage, got 3"),
        ({"norm": "groupnorm"}, "unknown norm 'groupnorm'"),
        ({"attention": "LLLL", "attn_drop_rate": 0.1}, "attn_drop must be 0"),
    ],
    ids=["plan", "letter", "stages", "heads", "norm", "attn_drop"],
)
def test_arguments_that_make_no_model_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        create(**arguments)
    assert "\n" not in str(error.value)


class TestFusing:
    @pytest.mark.parametrize("fixed_windows", [False, True], ids=["whole_map", "fixed"])
    def test_every_norm_is_folded_at_every_size(self, fixed_windows):
        model = fusing.ready(create(fixed_windows=fixed_windows))
        result, report = fusing.fused(model, images())
        assert (report.num_folded, report.num_kept) == (15, 0), report.table()
        assert not any(isinstance(module, (PRepBN, RepBN, nn.LayerNorm)) for module in result.modules())
        for size in SIZES[1:]:
            fusing.assert_same_outputs(model, result, (images(*size),))

    @pytest.mark.slow
    @pytest.mark.parametrize("attention", ["SSSS", "LLLL", "SLSL"])
    def test_every_plan_folds(self, attention):
        model = fusing.ready(create(attention))
        result, report = fusing.fused(model, images())
        assert report.num_kept == 0, report.table()
        fusing.assert_same_outputs(model, result, (images(40, 100),))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", NAMES)
    def test_every_published_model_folds(self, name):
        model = fusing.ready(timm.create_model(name))
        with torch.no_grad():
            result, report = fusing.fuse(model, images(96, 96, batch=1))
        assert report.num_kept == 0, report.table()
        fusing.assert_same_outputs(model, result, (images(64, 100, batch=1),))
