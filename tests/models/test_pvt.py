"""PVT, and what PVTv2 has in common with it: sizes, plans, training, fusing, and settings that cannot be."""

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
from fusing import assert_same_outputs, fused
from slabformer import PRepBN, RepBN
from slabformer.models.registry import baseline_of
from slabformer.models.weights.published import PUBLISHED
from slabformer.nn.attention_variants import PyramidAttention, PyramidLinearAttention
from small_pvts import KINDS, V1, V2, attentions, families, images, kinds, small
from tolerances import ALGEBRA, assert_close

PVTS = [
    pytest.param(row, id=row.config, marks=[pytest.mark.slow] if row.config.endswith(("b4", "b5")) else [])
    for row in PUBLISHED.values()
    if "pvt" in row.config
]


@pytest.mark.parametrize("row", PVTS)
def test_published_models_have_the_published_parameters(row):
    with torch.device("meta"):
        model = timm.create_model(row.model)
    assert model.attention == row.attention
    assert row.num_params in (None, sum(p.numel() for p in model.parameters()))
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == row.norm_eps
        if isinstance(module, RepBN):
            assert (module.eps, module.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large"])
def test_layernorm_baselines_are_as_large_and_hold_layernorms_and_softmax_alone(size):
    assert baseline_of(f"slab_pvt_{size}") == f"pvt_{size}"
    with torch.device("meta"):
        baseline, slab = timm.create_model(f"pvt_{size}"), timm.create_model(f"slab_pvt_{size}")
    assert {type(attn) for attn in attentions(baseline)} == {PyramidAttention}
    assert {type(attn) for attn in attentions(slab)} == {PyramidLinearAttention}
    assert not any(isinstance(module, (PRepBN, RepBN)) for module in baseline.modules())
    assert [len(stage.blocks) for stage in baseline.stages] == [len(stage.blocks) for stage in slab.stages]


@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_models_that_change_the_norm_alone_have_that_baseline_too(size):
    assert baseline_of(f"pvt_{size}_prepbn") == f"pvt_{size}"


def test_a_plan_gives_each_stage_its_attention_and_reduction():
    model = small(V1, attention="LSLS")
    types = [type(stage.blocks[0].attn) for stage in model.stages]
    assert types == [PyramidLinearAttention, PyramidAttention] * 2
    assert [stage.blocks[0].attn.sr_ratio for stage in model.stages] == [1, 4, 1, 1]


@families
def test_the_head_is_reset_as_timms_users_expect(name):
    model = small(name, num_classes=3)
    assert model(images()).shape == (2, 3)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(images()).shape == (2, 32)
    assert model.forward_head(model.forward_features(images()), pre_logits=True).shape == (2, 32)


def test_other_numbers_of_channels_go_in():
    assert small(V1, in_chans=1)(images()[:, :1]).shape == (2, 5)


@kinds
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(name, kwargs):
    assert_checkpointing_changes_nothing(lambda: small(name, **kwargs), images())


@families
def test_all_parameters_of_more_than_one_dimension_are_decayed(name):
    model = small(name)
    decayed = decayed_names(model)
    assert decayed == matrix_names(model)
    assert "stages.0.blocks.0.attn.positional_encoding" in decayed
    assert ("stages.0.pos_embed" in decayed) == (name == V1)


@families
@pytest.mark.parametrize("coarse", [False, True], ids=["blocks", "stages"])
def test_layer_groups_cover_every_parameter_once(name, coarse):
    num_groups = assert_groups_cover_every_parameter_once(small(name), coarse)
    assert num_groups == (1 + 4 + 1 if coarse else 1 + 5 + 1)


@families
@pytest.mark.parametrize(("norm", "kind"), [("prepbn", PRepBN), ("repbn", RepBN), ("layernorm", nn.LayerNorm)])
def test_every_norm_is_of_the_kind_asked_for(name, norm, kind):
    model = small(name, norm=norm, attention="SSLL")
    norms = [module for path, module in model.named_modules() if path.rpartition(".")[2] in ("norm", "norm1", "norm2")]
    norms = [module for module in norms if not isinstance(module, nn.Identity)]
    outer = [module for module in norms if not any(module is getattr(n, "norm", None) for n in norms)]
    assert {type(module) for module in outer} == {kind}
    # patch embeddings, two a block, the reductions' in the first two stages, and in v2 one a stage
    assert len(outer) == 4 + 10 + 3 + (4 if name == V2 else 0)


@families
def test_bfloat16_stays_near_float64(name):
    model, x = small(name), images()
    expected = model(x)
    actual = model.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected, 0.1)  # a few units in the last place of 8 bits, through five blocks


@pytest.mark.slow
@families
def test_models_compile_in_one_piece(name):
    model, x = small(name, attention="LSLS", depths=(1, 1, 1, 1)), images(40, 72)
    torch._dynamo.reset()
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), ALGEBRA)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention": "LLS"}, "attention needs one letter for each of 4 stages, got 'LLS'"),
        ({"attention": "LLXS"}, "unknown letter 'X' in attention 'LLXS'; a stage is one of S .*, L"),
        ({"sr_ratios": (8, 4)}, r"sr_ratios needs one value for each of 4 stages, got \(8, 4\)"),
        ({"num_heads": (3, 2, 3, 4)}, r"num_heads\[0\] must divide the 8 channels of its stage, got 3"),
        (
            {"num_heads": (3, 2, 3, 4), "attention": "SSSS"},
            r"num_heads\[0\] must divide the 8 channels of its stage, got 3",
        ),
        ({"attn_drop_rate": 0.1}, "attn_drop must be 0, got 0.1"),
        ({"resize": "3d"}, "resize must be '2d' or '1d', got '3d'"),
        ({"norm": "groupnorm"}, "unknown norm 'groupnorm'"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or '', got 'max'"),
    ],
    ids=["length", "letter", "list", "heads-linear", "heads-softmax", "dropout", "resize", "norm", "pool"],
)
def test_settings_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        small(V1, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pvt"])
def test_all_norms_fold_at_every_size(kind):
    """In v2, those in front of padded patch embeddings may stay as an Affine, and no others."""
    name, kwargs = KINDS[kind]
    model = small(name, depths=(1, 1, 1, 1), **kwargs)
    result, report = fused(model, images())
    kept = {outcome.name for outcome in report if outcome.action == "kept"}
    assert kept <= ({f"stages.{i}.norm" for i in range(3)} if name == V2 else set())
    for size in ((96, 64), (50, 70)):
        assert_same_outputs(model, result, (images(*size),))
