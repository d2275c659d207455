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
from fusing import assert_same_outputs, fused, ready
from reference_files import description
from slabformer import PRepBN, testing
from slabformer.models.cswin import MapLinearAttention
from slabformer.models.registry import baseline_of
from slabformer.models.weights.official import load_published, to_published
from slabformer.models.weights.published import PUBLISHED
from tolerances import ALGEBRA, EXACT, assert_close

#: a block a stage, widths 8 to 64; stages of images of 64 pixels are maps of 16, 8, 4 and 2
SMALL = {"depths": (1, 1, 2, 1), "embed_dim": 8, "num_heads": (2, 2, 4, 4), "num_classes": 10, "img_size": 64}
PLANS = ("LLSS", "SSSS", "LLLL")
#: no multiple of the stride; stripes of 7 that tile no map; maps narrower than a stripe
SIZES = ((64, 64), (96, 160), (50, 290), (33, 31))


def create(name: str = "slab_cswin_tiny", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return testing.randomize_norms_(timm.create_model(name, **(SMALL | kwargs))).double().eval()


def images(height: int = 64, width: int = 64, in_chans: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, in_chans, height, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("config", ["slab_cswin_t", "slab_cswin_s"])
def test_parameters_are_as_many_as_published(config):
    row = PUBLISHED[config]
    with torch.device("meta"):
        model = timm.create_model(row.model)
        baseline = timm.create_model(baseline_of(row.model))
    unused = sum(p.shape[-1] for name, p in model.named_parameters() if name.endswith("positional_encoding"))
    assert sum(p.numel() for p in model.parameters()) == description(config)["parameters"] - unused
    assert not any(isinstance(module, (PRepBN, MapLinearAttention)) for module in baseline.modules())
    assert [len(stage.blocks) for stage in baseline.stages] == [len(stage.blocks) for stage in model.stages]


@pytest.mark.parametrize("attention", PLANS)
@pytest.mark.parametrize("norm", ["prepbn", "repbn", "layernorm"])
def test_every_mixture_of_norm_and_attention_is_a_model(attention, norm):
    model = create(attention=attention, norm=norm)
    out = model(images())
    assert out.shape == (2, 10)
    assert out.std() > 0
    linear = [any(isinstance(module, MapLinearAttention) for module in stage.modules()) for stage in model.stages]
    assert linear == [letter == "L" for letter in attention]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("attention", PLANS)
def test_another_image_size_gives_what_set_input_size_gives(size, attention):
    model, x = create(attention=attention), images(*size)
    expected = model(x)
    assert expected.shape == (2, 10)
    model.set_input_size(size)
    assert_close(model(x), expected, EXACT)
    height, width = (side + -side % 32 for side in size)
    tables = {module.grid_size for module in model.modules() if isinstance(module, MapLinearAttention)}
    assert tables == {(height // s, width // s) for s, a in zip((4, 8, 16, 32), attention, strict=True) if a == "L"}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_are_the_stages_maps(size):
    model = create()
    backbone = create(features_only=True, out_indices=(0, 2, 3))
    backbone.model.load_state_dict(model.state_dict(), strict=False)  # it has neither final norm nor head
    assert backbone.feature_info.channels() == [8, 32, 64]
    assert backbone.feature_info.reduction() == [4, 16, 32]
    outputs = []
    for index in (0, 2, 3):
        model.stages[index].register_forward_hook(lambda _, __, out: outputs.append(out))
    model(images(*size))
    for features, expected, stride in zip(backbone(images(*size)), outputs, (4, 16, 32), strict=True):
        assert_close(features, expected.permute(0, 3, 1, 2), EXACT)
        assert features.shape[2:] == tuple((side + -side % 32) // stride for side in size)


def test_intermediates_end_in_the_forward_features():
    model, x = create(), images()
    final, maps = model.forward_intermediates(x, indices=2, norm=True, output_fmt="NHWC")
    assert [m.shape for m in maps] == [(2, 4, 4, 32), (2, 2, 2, 64)]
    assert_close(final, model.forward_features(x), EXACT)
    assert_close(maps[-1], final, EXACT)


def test_the_head_is_reset_as_timms_users_expect():
    model = create(num_classes=3)
    assert model(images()).shape == (2, 3)
    model.reset_classifier(5)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert model.double()(images()).shape == (2, 64)


@pytest.mark.parametrize("attention", ["LLSS", "SSSS"])
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(attention):
    assert_checkpointing_changes_nothing(lambda: create(attention=attention, drop_path_rate=0.0), images())


def test_position_tables_are_decayed():
    model = timm.create_model("slab_cswin_tiny", **SMALL)
    decayed = decayed_names(model)
    assert "stages.0.blocks.0.attn.attns.0.positional_encoding" in decayed
    assert decayed == matrix_names(model)


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_cover_every_parameter_once(coarse):
    assert_groups_cover_every_parameter_once(timm.create_model("slab_cswin_tiny", **SMALL), coarse)


def test_bfloat16_stays_near_float64():
    model, x = create(), images(96, 160)
    expected = model(x)
    actual = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.1 * expected.std()  # eight bits, seven blocks


@pytest.mark.parametrize("attention", ["LLSS", "SSSS"])
def test_every_norm_is_folded_at_every_size(attention):
    model = ready(timm.create_model("slab_cswin_tiny", attention=attention, **SMALL))
    result, report = fused(model, images())
    assert report.num_kept == 0
    assert report.num_folded == 2 * 5 + 5  # two a block, one after each of four convolutions, the last
    for size in SIZES[1:]:
        assert_same_outputs(model, result, (images(*size),))


@pytest.mark.slow
def test_its_graph_has_no_breaks():
    model, x = create(depths=(1, 1, 1, 1)), images(96, 160)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_close(compiled(x), model(x), ALGEBRA)


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path):
        """As published, for 224 px and 10 classes."""
        model = ready(timm.create_model("slab_cswin_tiny", **(SMALL | {"img_size": 224})), torch.float32)
        torch.save({"model": to_published(model)}, tmp_path / "published.pth")
        return tmp_path / "published.pth"

    def test_a_file_fits_another_head_stem_and_size(self, path):
        options = {"num_classes": 3, "in_chans": 1, "img_size": (64, 96)}
        overlay = {"file": str(path), "custom_load": True}
        model = timm.create_model(
            "slab_cswin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **(SMALL | options)
        )
        original = timm.create_model("slab_cswin_tiny", **(SMALL | {"img_size": 224}))
        load_published(original, path)
        original.set_input_size((64, 96))
        x = torch.randn(1, 1, 64, 96)
        expected = original.eval().forward_features(x.expand(-1, 3, -1, -1))
        assert model.eval()(x).shape == (1, 3)
        # the single channel's kernel is the sum of three
        assert (model.forward_features(x) - expected).abs().max() < 1e-4 * expected.std()

    def test_a_file_of_another_model_is_refused_in_a_line(self, path):
        model = timm.create_model("slab_cswin_tiny", attention="LSSS", **(SMALL | {"img_size": 224}))
        with pytest.raises(
            ValueError, match=r"checkpoint does not fit slab_cswin_tiny: .*missing .*unexpected"
        ) as error:
            load_published(model, path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "LLS"}, "attention needs one letter for each of 4 stages, got 'LLS'"),
        ({"attention": "LLSX"}, "unknown letter 'X' in attention 'LLSX'; a stage is one of S .*, L .*"),
        ({"num_heads": (2, 2)}, r"num_heads needs one for each of 4 stages, got \(2, 2\)"),
        ({"stripe_widths": (1,)}, r"stripe_widths needs one for each of 4 stages, got \(1,\)"),
        ({"num_heads": (2, 2, 1, 4)}, "num_heads must be even, got 1"),
        ({"stripe_widths": (1, 2, 0, None)}, r"stripe_widths\[2\] must be at least 1, got 0"),
        ({"norm": "groupnorm"}, "unknown norm 'groupnorm'"),
    ],
    ids=["length", "letter", "heads", "widths", "odd", "width", "norm"],
)
def test_settings_that_cannot_be_are_refused_in_a_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        timm.create_model("slab_cswin_tiny", **(SMALL | arguments))
    assert "\n" not in str(error.value)
