from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from reference_files import description, fill, published_state, reference
from slabformer.models.official import load_published, to_published
from slabformer.models.swin_backbone import SwinBackbone
from tolerances import EXACT, FLOAT32, assert_close

PLANS = {"detection_slab_swin_t": "LLSS", "detection_swin_t_prepbn": "SSSS"}


@pytest.fixture(scope="module", params=PLANS)
def published(request) -> tuple[str, SwinBackbone]:
    """A published detection backbone with the contents of its reference."""
    model = SwinBackbone(attention=PLANS[request.param]).eval()
    load_published(model, published_state(request.param))
    return request.param, model


# 224x224 needs no padding but shifts whole maps; 256x320 pads every map, to as much as twice its area
@pytest.mark.parametrize("size", [(224, 224), (256, 320)], ids=lambda size: "x".join(map(str, size)))
def test_maps_equal_the_published_ones(published, size):
    name, model = published
    expected, key = reference(name), "x".join(map(str, size))
    with torch.no_grad():
        maps = model(fill.image(1, *size))
    for level, x in enumerate(maps):
        assert x.shape == tuple(expected[f"c{level}_{key}_shape"].tolist())
        assert_close(x.mean((2, 3)), expected[f"c{level}_{key}_mean"], FLOAT32)
        assert_close(x[:, :8, -3:, -3:], expected[f"c{level}_{key}_corner"], FLOAT32)


def test_the_published_layout_comes_back(published):
    name, model = published
    state, back = published_state(name), to_published(model)
    written = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in back.items()}
    assert list(written.items()) == list(description(name)["state_dict"].items())
    for key, value in state.items():
        if value.is_floating_point():
            assert_close(back[key], value, EXACT)
    again = SwinBackbone(attention=PLANS[name])
    load_published(again, back)
    for key, value in model.state_dict().items():
        assert_close(again.state_dict()[key], value, EXACT)


SMALL = {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "img_size": 64}


@pytest.mark.parametrize("fixed_windows", [True, False], ids=["fixed", "whole_map"])
def test_a_classifiers_file_leaves_output_norms_as_they_are(tmp_path, fixed_windows):
    classifier = timm.create_model("slab_swin_tiny", num_classes=10, **SMALL)
    for norm in (module for module in classifier.modules() if hasattr(module, "set_gamma")):
        norm.set_gamma(0.0)
    torch.save({"model": to_published(classifier)}, tmp_path / "classifier.pth")
    backbone = SwinBackbone(fixed_windows=fixed_windows, **{**SMALL, "img_size": 64 if fixed_windows else 128})
    nn.init.constant_(backbone.norm2.weight, 3.0)
    backbone.load_pretrained(str(tmp_path / "classifier.pth"))
    assert_close(
        backbone.stages[1].downsample.reduction.weight, classifier.stages[1].downsample.reduction.weight, EXACT
    )
    assert backbone.norm2.weight.unique().item() == 3.0
    with pytest.raises(ValueError, match=r"8 tensors missing \(first: norm0.weight\)"):
        load_published(backbone, tmp_path / "classifier.pth")
