from __future__ import annotations

import pytest
import torch

from reference_files import description, fill, published_state, reference
from slabformer.models.detection.backbones import create_backbone
from slabformer.models.detection.weights import load_backbone_weights
from slabformer.models.weights.official import load_published, to_published
from tolerances import EXACT, FLOAT32, assert_close

PUBLISHED = {"detection_slab_swin_t": "slab_swin_tiny", "detection_swin_t_prepbn": "swin_tiny_prepbn"}
SMALL = {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "img_size": 64}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request):
    """A published detection backbone with the contents of its reference, and what its loading reported."""
    backbone = create_backbone(PUBLISHED[request.param], published=True).eval()
    return request.param, backbone, load_backbone_weights(backbone, published_state(request.param))


# 224x224 needs no padding but shifts whole maps; 256x320 pads every map, to as much as twice its area
@pytest.mark.parametrize("size", [(224, 224), (256, 320)], ids=lambda size: "x".join(map(str, size)))
def test_maps_equal_the_published_ones(published, size):
    name, backbone, _ = published
    expected, key = reference(name), "x".join(map(str, size))
    with torch.no_grad():
        maps = backbone(fill.image(1, *size))
    for level, x in enumerate(maps):
        assert x.shape == tuple(expected[f"c{level}_{key}_shape"].tolist())
        assert_close(x.mean((2, 3)), expected[f"c{level}_{key}_mean"], FLOAT32)
        assert_close(x[:, :8, -3:, -3:], expected[f"c{level}_{key}_corner"], FLOAT32)


def test_the_published_layout_comes_back(published):
    name, backbone, report = published
    assert report.missing == []
    assert all(key.endswith("relative_position_index") for key in report.dropped)
    state, back = published_state(name), to_published(backbone)
    written = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in back.items()}
    assert list(written.items()) == list(description(name)["state_dict"].items())
    for key, value in state.items():
        if value.is_floating_point():
            assert_close(back[key], value, EXACT)
    again = create_backbone(PUBLISHED[name], published=True)
    load_published(again, back)
    for key, value in backbone.state_dict().items():
        assert_close(again.state_dict()[key], value, EXACT)


FAMILIES = {
    "slab_swin_tiny": SMALL,
    "swin_tiny_prepbn": SMALL,
    "pvt_tiny_prepbn": {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "slab_pvt_tiny": {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "slab_cswin_tiny": {"embed_dim": 8, "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "img_size": 64},
    "slab_deit_tiny": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    "deit_tiny_prepbn": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    "deit_micro": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "strict_img_size": False},
    "vit_tiny_patch16_224": {"embed_dim": 32, "depth": 4, "num_heads": 2, "dynamic_img_size": True},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_four_maps_at_any_size(name):
    backbone = create_backbone(name, **FAMILIES[name]).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 96, 160))
    assert [tuple(x.shape[2:]) for x in maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert [x.shape[1] for x in maps] == backbone.num_channels
    assert all(x.std() > 0 for x in maps)
