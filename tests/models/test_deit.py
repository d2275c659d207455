from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from backbones import (
    assert_checkpointing_changes_nothing,
    assert_groups_cover_every_parameter_once,
    decayed_names,
    matrix_names,
)
from reference_files import description
from slabformer import PRepBN, RepBN, SimplifiedLinearAttention, testing
from slabformer.models.weights.published import PUBLISHED
from tolerances import ALGEBRA, EXACT, assert_close

MICROS = ("deit_micro", "deit_micro_prepbn", "slab_deit_micro")
TINIES = ("deit_tiny_prepbn", "deit_small_prepbn", "slab_deit_tiny", "slab_deit_small")


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return testing.randomize_norms_(timm.create_model(name, **kwargs)).double().eval()


def images(height: int = 32, width: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", ["deit_t_prepbn", "deit_s_prepbn", "slab_deit_t", "slab_deit_s"])
def test_parameters_are_as_many_as_published(config):
    row = PUBLISHED[config]
    model = timm.create_model(row.model, norm=row.norm)
    unused = model.embed_dim if config.startswith("slab") else 0  # their class token, which nothing reads
    assert sum(p.numel() for p in model.parameters()) == description(config)["parameters"] - unused


@pytest.mark.parametrize("name", TINIES)
def test_published_models_take_published_images(name):
    model = timm.create_model(name).eval()
    assert model.pretrained_cfg["architecture"] == name
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize("name", MICROS)
def test_features_are_the_blocks_outputs_as_maps(name):
    model = create(name)
    backbone = create(name, features_only=True, out_indices=(1, 3))
    backbone.model.load_state_dict(model.state_dict(), strict=False)  # it has neither final norm nor head
    assert backbone.feature_info.channels() == [64, 64]
    assert backbone.feature_info.reduction() == [4, 4]
    outputs = {}
    for index in (1, 3):
        model.blocks[index].register_forward_hook(lambda _, __, out, index=index: outputs.update({index: out}))
    model(images())
    for index, features in zip((1, 3), backbone(images()), strict=True):
        expected = outputs[index][:, model.num_prefix_tokens :].transpose(1, 2).reshape(2, 64, 8, 8)
        assert_close(features, expected, EXACT)


@pytest.mark.parametrize("name", MICROS)
def test_intermediates_end_in_the_forward_features(name):
    model, x = create(name), images()
    final, tokens = model.forward_intermediates(x, indices=2, norm=True, output_fmt="NLC")
    assert [t.shape for t in tokens] == [(2, 64, 64)] * 2
    assert_close(final, model.forward_features(x), EXACT)
    assert_close(tokens[-1], final[:, model.num_prefix_tokens :], EXACT)
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert_close(early[0], model.forward_intermediates(x, indices=[0])[1][0], EXACT)
    both = model.forward_intermediates(x, indices=[0], output_dict=True)
    assert_close(both["image_features"], final, EXACT)
    assert_close(both["image_intermediates"][0], early[0], EXACT)
    with pytest.raises((ValueError, AssertionError), match="NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", MICROS)
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (16, 48)], ids=str)
def test_a_dynamic_image_size_gives_what_set_input_size_gives(name, size):
    dynamic, fixed = create(name, dynamic_img_size=True), create(name)
    with torch.no_grad():  # a table that varies, so that its resampling shows
        for model in (dynamic, fixed):
            for module in model.modules():
                if isinstance(module, SimplifiedLinearAttention):
                    table = module.positional_encoding
                    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
    expected = dynamic(images(*size))
    fixed.set_input_size(size)
    # timm resamples pos_embed through float32
    assert_close(fixed(images(*size)), expected, ALGEBRA)
    features = dynamic.forward_intermediates(images(*size), indices=1, intermediates_only=True)
    assert features[0].shape == (2, 64, size[0] // 4, size[1] // 4)


def test_another_image_size_from_the_start_makes_tables_of_its_grid():
    model = create("slab_deit_micro", img_size=(40, 24))
    assert model.blocks[0].attn.grid_size == (10, 6)
    assert model(images(40, 24)).shape == (2, 10)


@pytest.mark.parametrize("name", MICROS)
def test_the_head_is_reset_as_timms_users_expect(name):
    model = create(name, num_classes=3)
    assert model(images()).shape == (2, 3)
    model.reset_classifier(5)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert model.double()(images()).shape == (2, 64)
    assert model.forward_head(model.forward_features(images()), pre_logits=True).shape == (2, 64)


@pytest.mark.parametrize("name", MICROS)
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(name):
    assert_checkpointing_changes_nothing(lambda: create(name), images())


def test_position_tables_of_the_attention_are_decayed_and_the_models_is_not():
    model = timm.create_model("slab_deit_micro")
    decayed = decayed_names(model)
    assert "blocks.0.attn.positional_encoding" in decayed
    assert "pos_embed" not in decayed
    assert decayed == matrix_names(model) - {"pos_embed"}


@pytest.mark.parametrize("name", MICROS)
def test_layer_groups_cover_every_parameter_once(name):
    assert_groups_cover_every_parameter_once(timm.create_model(name))


@pytest.mark.parametrize(("norm", "kind"), [("prepbn", PRepBN), ("repbn", RepBN), ("layernorm", nn.LayerNorm)])
@pytest.mark.parametrize("name", ["deit_micro_prepbn", "slab_deit_micro"])
def test_norms_have_names(name, norm, kind):
    model = timm.create_model(name, norm=norm)
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    assert {type(norm) for norm in norms} == {kind}
    assert len(norms) == 9


def test_norms_may_be_constructors_and_unknown_names_are_refused():
    assert isinstance(timm.create_model("slab_deit_micro", norm=nn.RMSNorm).norm, nn.RMSNorm)
    with pytest.raises(ValueError, match=r"unknown norm 'groupnorm'.* choose from prepbn, repbn, batchnorm"):
        timm.create_model("slab_deit_micro", norm="groupnorm")


@pytest.mark.parametrize("name", [*TINIES, "deit_micro"])
def test_epsilons_are_the_published_ones(name):
    model = timm.create_model(name, depth=1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
        if isinstance(module, RepBN):
            assert (module.eps, module.momentum, module.normalized_shape) == (1e-5, 0.1, (model.embed_dim,))


def test_the_final_norm_comes_before_the_mean_over_tokens():
    model, x = create("slab_deit_micro"), images()
    before = model.norm.rep.num_batches_tracked.clone()
    model.norm.set_gamma(0.0)
    tokens = {}
    model.norm.register_forward_hook(lambda _, inputs, out: tokens.update(norm=inputs[0], out=out))
    model.train()(x)
    assert tokens["norm"].shape == (2, 64, 64)
    assert model.norm.rep.num_batches_tracked == before + 1
    assert isinstance(model.fc_norm, nn.Identity)
    assert_close(model.pool(tokens["out"]), tokens["out"].mean(1), EXACT)
    assert model.cls_token is None


@pytest.mark.parametrize("argument", [{"class_token": True}, {"reg_tokens": 2}, {"patch_drop_rate": 0.5}], ids=str)
def test_linear_attention_refuses_tokens_off_the_grid(argument):
    with pytest.raises(ValueError, match="needs the whole token grid"):
        timm.create_model("slab_deit_micro", **argument)


def test_linear_attention_refuses_dropout_of_weights():
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        timm.create_model("slab_deit_micro", attn_drop_rate=0.1)
