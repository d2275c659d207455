"""PVT, and what PVTv2 has in common with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

from fusing import assert_same_outputs, fused
from slabformer import PRepBN, RepBN
from slabformer.models.official import load_published, to_published
from slabformer.models.published import PUBLISHED
from slabformer.models.registry import twin_of
from slabformer.nn.attention_variants import PyramidAttention, PyramidLinearAttention
from slabformer.nn.resample import resample_table
from small_pvts import SMALL, images, small
from tolerances import ALGEBRA, EXACT, assert_close

V1, V2 = "slab_pvt_tiny", "slab_pvt_v2_b0"
#: a model of every kind: its name and arguments
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "slab_pvt": (V1, {}),
    "pvt_prepbn": ("pvt_tiny_prepbn", {}),
    "pvt": ("pvt_tiny", {}),
    "mixed": (V1, {"attention": "LSLS", "norm": "repbn"}),
    "reduced": (V1, {"linear_sr_ratios": (8, 4, 2, 1)}),
    "slab_pvt_v2": (V2, {}),
    "pvt_v2_mixed": (V2, {"attention": "SSLL"}),
}
kinds = pytest.mark.parametrize(("name", "kwargs"), KINDS.values(), ids=KINDS)
PVTS = [
    pytest.param(row, id=row.config, marks=[pytest.mark.slow] if row.config.endswith(("b4", "b5")) else [])
    for row in PUBLISHED.values()
    if "pvt" in row.config
]
families = pytest.mark.parametrize("name", [V1, V2])


def attentions(model: nn.Module) -> list[nn.Module]:
    return [block.attn for stage in model.stages for block in stage.blocks]


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
def test_layernorm_twins_are_as_large_and_hold_layernorms_and_softmax_alone(size):
    assert twin_of(f"slab_pvt_{size}") == f"pvt_{size}"
    with torch.device("meta"):
        twin, slab = timm.create_model(f"pvt_{size}"), timm.create_model(f"slab_pvt_{size}")
    assert {type(attn) for attn in attentions(twin)} == {PyramidAttention}
    assert {type(attn) for attn in attentions(slab)} == {PyramidLinearAttention}
    assert not any(isinstance(module, (PRepBN, RepBN)) for module in twin.modules())
    assert [len(stage.blocks) for stage in twin.stages] == [len(stage.blocks) for stage in slab.stages]


@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_models_that_change_the_norm_alone_have_that_twin_too(size):
    assert twin_of(f"pvt_{size}_prepbn") == f"pvt_{size}"


def test_a_plan_gives_each_stage_its_attention_and_reduction():
    model = small(V1, attention="LSLS")
    types = [type(stage.blocks[0].attn) for stage in model.stages]
    assert types == [PyramidLinearAttention, PyramidAttention] * 2
    assert [stage.blocks[0].attn.sr_ratio for stage in model.stages] == [1, 4, 1, 1]


@kinds
def test_features_are_what_stages_return(name, kwargs):
    model, backbone = small(name, **kwargs), small(name, features_only=True, out_indices=(1, 3), **kwargs)
    backbone.model.load_state_dict(model.state_dict(), strict=False)  # it has no head
    assert backbone.feature_info.channels() == [16, 32]
    assert backbone.feature_info.reduction() == [8, 32]
    outputs = []
    for index in (1, 3):
        model.stages[index].register_forward_hook(lambda _, __, out: outputs.append(out.permute(0, 3, 1, 2)))
    model(images())
    features = backbone(images())
    assert [tuple(f.shape[1:]) for f in features] == [(16, 8, 8), (32, 2, 2)]
    for feature, expected in zip(features, outputs, strict=True):
        assert_close(feature, expected, EXACT)


@families
def test_intermediates_end_in_the_forward_features(name):
    model, x = small(name), images()
    final, maps = model.forward_intermediates(x, indices=2, norm=True, output_fmt="NHWC")
    assert [m.shape for m in maps] == [(2, 4, 4, 24), (2, 2, 2, 32)]
    assert_close(final, model.forward_features(x), EXACT)
    assert_close(maps[-1], final, EXACT)
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert_close(early[0], model.forward_intermediates(x, indices=[0])[1][0], EXACT)


@kinds
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (40, 72), (7, 33)], ids=str)
def test_any_size_gives_what_set_input_size_gives(name, kwargs, size):
    model, x = small(name, **kwargs), images(*size)
    expected = model(x)
    features = model.forward_intermediates(x, intermediates_only=True)
    height, width = (side + -side % 32 for side in size)
    assert [tuple(f.shape[2:]) for f in features] == [(height // s, width // s) for s in (4, 8, 16, 32)]
    model.set_input_size(size)
    assert_close(model(x), expected, EXACT)


@families
def test_images_are_padded_with_zeros_on_the_right_and_at_the_bottom(name):
    model, x = small(name), images(40, 50)
    assert_close(model(x), model(F.pad(x, (0, 14, 0, 24))), EXACT)


@families
def test_tables_can_be_made_for_another_size_from_the_start(name):
    model = small(name, img_size=(40, 96))
    assert [attn.grid_size for attn in attentions(model)] == [(16, 24), (8, 12), (8, 12), (4, 6), (2, 3)]
    assert model(images(40, 96)).shape == (2, 5)


@pytest.mark.parametrize(
    ("kwargs", "multiple"),
    [({"sr_ratios": (3, 2, 1, 1), "attention": "SSSS"}, 96), ({"linear_sr_ratios": (1, 1, 1, 2)}, 64)],
    ids=["softmax", "linear"],
)
def test_every_reduction_divides_its_map(kwargs, multiple):
    model = small(V1, **kwargs)
    assert model.pad_to == multiple
    x = images(40, 72)
    assert_close(model(x), model(F.pad(x, (0, -72 % multiple, 0, -40 % multiple))), EXACT)


def test_the_published_way_of_stretching_values_is_an_argument():
    published, ours = (small(V1, linear_sr_ratios=(8, 4, 2, 1), resize=how) for how in ("1d", "2d"))
    assert (published(images()) - ours(images())).abs().max() > 1e-4


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
    results = []
    for enable in (False, True):
        model = small(name, **kwargs).train()
        for module in model.modules():
            if isinstance(module, PRepBN):
                module.set_gamma(0.5)
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        results.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    for plain, checkpointed in zip(*results, strict=True):
        for key, value in plain.items():
            assert_close(checkpointed[key], value, EXACT)


@families
def test_all_parameters_of_more_than_one_dimension_are_decayed(name):
    model = small(name)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim > 1}
    assert "stages.0.blocks.0.attn.positional_encoding" in decayed
    assert ("stages.0.pos_embed" in decayed) == (name == V1)


@families
@pytest.mark.parametrize("coarse", [False, True], ids=["blocks", "stages"])
def test_layer_groups_cover_every_parameter_once(name, coarse):
    model = small(name)
    groups = group_parameters(model, model.group_matcher(coarse))
    assert len(groups) == (1 + 4 + 1 if coarse else 1 + 5 + 1)
    assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())


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


@kinds
def test_maps_stay_token_major(name, kwargs):
    model = small(name, **kwargs)
    strides = []
    for stage in model.stages:
        for module in (stage.downsample, *stage.blocks):
            module.register_forward_hook(lambda _, __, out: strides.append(out.is_contiguous()))
    model(images())
    assert strides == [True] * len(strides)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[V1, "pvt_tiny_prepbn", V2])
def release(request, tmp_path) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """A model's name, a published file of it for 224 px, and what is in there."""
    state = to_published(small(request.param, img_size=224).float())
    torch.save({"model": state}, tmp_path / "model.pth")
    return request.param, tmp_path / "model.pth", state


def pretrained(name: str, path: Path, **kwargs: Any) -> nn.Module:
    overlay = {"file": str(path), "custom_load": True}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs})


def test_a_file_comes_back_name_by_name(release):
    name, path, state = release
    back = to_published(pretrained(name, path, img_size=224))
    assert list(back) == list(state)
    for key, value in state.items():
        assert_close(back[key], value, EXACT)


def test_tables_of_a_file_follow_the_image_size(release):
    name, path, state = release
    model = pretrained(name, path, img_size=(64, 90))
    if name != V2:
        assert_close(model.stages[1].pos_embed, resample_table(state["pos_embed2"], (28, 28), (8, 12)), EXACT)
    if name != "pvt_tiny_prepbn":
        table = state["block1.0.attn.positional_encoding"]
        expected = resample_table(table, (56, 56), (16, 24))
        assert_close(model.stages[0].blocks[0].attn.positional_encoding, expected, EXACT)
    at_once = pretrained(name, path, img_size=224).eval()
    x = images(64, 90).float()
    assert_close(model.eval()(x), at_once(x), EXACT)


def test_grey_images_see_the_sum_of_the_colour_channels(release):
    name, path, state = release
    expected = state["patch_embed1.proj.weight"].sum(1, keepdim=True)
    assert_close(pretrained(name, path, in_chans=1).patch_embed.proj.weight, expected, EXACT)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_another_number_of_classes_asks_for_a_new_head(release, num_classes):
    name, path, state = release
    model = pretrained(name, path, num_classes=num_classes, img_size=224)
    assert model.num_classes == num_classes
    assert_close(model.stages[3].blocks[0].mlp.fc2.weight, state["block4.0.mlp.fc2.weight"], EXACT)


def test_features_come_pretrained(release):
    name, path, state = release
    backbone = pretrained(name, path, img_size=224, features_only=True)
    assert_close(backbone.model.stages[3].blocks[0].mlp.fc2.weight, state["block4.0.mlp.fc2.weight"], EXACT)


def test_a_file_of_another_plan_is_refused_in_one_line(release):
    name, path, _ = release
    other = "SSSS" if name != "pvt_tiny_prepbn" else "LLLL"
    model = small(name, attention=other, img_size=224)
    with pytest.raises(ValueError, match=f"checkpoint does not fit {name}: .* missing .*unexpected") as error:
        load_published(model, path)
    assert "\n" not in str(error.value)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention": "LLS"}, "attention needs one letter for each of 4 stages, got 'LLS'"),
        ({"attention": "LLXS"}, "unknown letter 'X' in attention 'LLXS'; a stage is one of S .*, L"),
        ({"sr_ratios": (8, 4)}, r"sr_ratios needs one value for each of 4 stages, got \(8, 4\)"),
        ({"num_heads": (3, 2, 3, 4)}, "dim must be a multiple of num_heads, got 8 and 3"),
        ({"num_heads": (3, 2, 3, 4), "attention": "SSSS"}, "dim must be a multiple of num_heads, got 8 and 3"),
        ({"attn_drop_rate": 0.1}, "attn_drop must be 0, got 0.1"),
        ({"resize": "3d"}, r"resize must be one of \('2d', '1d'\), got '3d'"),
        ({"norm": "batchnorm"}, "unknown norm 'batchnorm'"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or '', got 'max'"),
    ],
    ids=["length", "letter", "list", "heads-linear", "heads-softmax", "dropout", "resize", "norm", "pool"],
)
def test_settings_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        small(V1, **kwargs)
    assert "\n" not in str(error.value)


# --- fusing ----------------------------------------------------------------------------------------------------------


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
