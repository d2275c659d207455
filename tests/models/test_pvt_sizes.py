"""Maps of PVT and PVTv2 at any image size: features, tables, padding, reductions."""

from __future__ import annotations

import pytest
from torch.nn import functional as F

from small_pvts import V1, attentions, families, images, kinds, small
from tolerances import EXACT, assert_close


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


@kinds
def test_maps_stay_token_major(name, kwargs):
    model = small(name, **kwargs)
    strides = []
    for stage in model.stages:
        for module in (stage.downsample, *stage.blocks):
            module.register_forward_hook(lambda _, __, out: strides.append(out.is_contiguous()))
    model(images())
    assert strides == [True] * len(strides)
