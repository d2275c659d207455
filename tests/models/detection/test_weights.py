from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from detectors import SMALL, SMALL_SWIN, objects, pictures, small_detector
from slabformer.models.detection.backbones import Backbone, create_backbone, freeze_norm_statistics_
from slabformer.models.detection.weights import load_backbone_weights
from slabformer.models.weights.official import to_published
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.nn.resample import resample_table
from slabformer.testing import randomize_norms_
from tolerances import EXACT, assert_close

FAMILIES = {
    name: next(small for family, small in SMALL.items() if family in name)
    for name in ("slab_swin_tiny", "pvt_tiny_prepbn", "slab_cswin_tiny", "slab_deit_tiny", "deit_tiny_prepbn")
}


def classifier(name: str, gamma: float = 0.0) -> nn.Module:
    """A small one with norms that matter."""
    model = randomize_norms_(timm.create_model(name, num_classes=10, **FAMILIES[name]))
    for norm in prepbn_modules(model).values():
        norm.set_gamma(gamma)
    return model


@pytest.mark.parametrize("layout", ["published", "own"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifiers_weights_fit_and_what_does_not_is_told(tmp_path, name, layout):
    model, backbone = classifier(name), create_backbone(name, **FAMILIES[name])
    before = [norm.state_dict() for norm in backbone.output_norms]
    if layout == "published":
        torch.save({"model": to_published(model)}, tmp_path / "classifier.pth")
        report = load_backbone_weights(backbone, tmp_path / "classifier.pth")
    else:
        report = load_backbone_weights(backbone, model.state_dict())
    assert "head.weight" in report.dropped
    assert set(report.missing) == {key for key in backbone.state_dict() if not key.startswith("body.")}
    state = model.state_dict()
    for key, value in backbone.body.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert_close(value, state[key], EXACT)
    assert {norm.phase for norm in prepbn_modules(backbone.body).values()} == {"done"}
    for norm, state in zip(backbone.output_norms, before, strict=True):
        assert all(torch.equal(value, norm.state_dict()[key]) for key, value in state.items())


def test_norms_that_were_still_fading_go_on_fading():
    backbone = create_backbone("slab_swin_tiny", **SMALL_SWIN)
    load_backbone_weights(backbone, classifier("slab_swin_tiny", gamma=0.25).state_dict())
    assert {float(norm.gamma) for norm in prepbn_modules(backbone).values()} == {0.25}


@pytest.mark.parametrize("layout", ["published", "own"])
def test_position_tables_are_resampled_to_another_size(layout):
    model = classifier("slab_swin_tiny")
    backbone = create_backbone("slab_swin_tiny", **SMALL_SWIN | {"img_size": (96, 128)})
    load_backbone_weights(backbone, to_published(model) if layout == "published" else model.state_dict())
    table = model.stages[0].blocks[0].attn.positional_encoding
    resampled = backbone.body.stages[0].blocks[0].attn.positional_encoding
    assert_close(resampled, resample_table(table, (16, 16), (24, 32)), EXACT)


def test_published_windows_keep_their_tables():
    model = classifier("slab_swin_tiny")
    backbone = create_backbone("slab_swin_tiny", published=True, **SMALL_SWIN)
    report = load_backbone_weights(backbone, to_published(model))
    assert report.missing == [f"output_norms.{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")]
    table = backbone.body.stages[0].blocks[0].attn.positional_encoding
    assert_close(table, model.stages[0].blocks[0].attn.positional_encoding, EXACT)


@pytest.mark.parametrize("layout", ["published", "own"])
def test_weights_of_another_model_change_nothing(layout):
    model = classifier("slab_swin_tiny")
    state = to_published(model) if layout == "published" else model.state_dict()
    removed = next(key for key in state if key.endswith("qkv.weight"))
    del state[removed]
    backbone = create_backbone("slab_swin_tiny", **SMALL_SWIN)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=rf"1 (tensors )?missing.*{removed}"):
        load_backbone_weights(backbone, state)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_frozen_statistics_stand_still_while_the_rest_trains():
    detector = small_detector(backbone={"output_norm": "prepbn"})
    freeze_norm_statistics_(detector)
    detector.train()
    norms = repbn_modules(detector.backbone.body.body)
    fresh = repbn_modules(detector.backbone.body.output_norms)
    for norm in prepbn_modules(detector).values():
        norm.set_gamma(0.5)
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    sum(detector(pictures((64, 64)), [objects(2, (64, 64))]).values()).backward()
    for name, norm in norms.items():
        assert_close(norm.running_mean, before[name], EXACT)
        assert norm.num_batches_tracked == 0
        assert norm.weight.grad.any()
        assert norm.eta.grad.any()
    assert all(norm.num_batches_tracked == 1 for norm in fresh.values())
    freeze_norm_statistics_(detector, frozen=False)
    detector(pictures((64, 64)), [objects(2, (64, 64))])
    assert all(norm.num_batches_tracked == 1 for norm in norms.values())


def test_frozen_statistics_stand_still_while_norms_are_still_warm():
    backbone = create_backbone("slab_swin_tiny", **SMALL_SWIN).train()
    freeze_norm_statistics_(backbone)
    for norm in repbn_modules(backbone).values():
        norm.warm_statistics = True
    backbone(torch.randn(2, 3, 64, 64))
    assert not any(norm.running_mean.any() for norm in repbn_modules(backbone).values())


def test_freezing_needs_a_backbone():
    with pytest.raises(ValueError, match="Linear holds no backbone"):
        freeze_norm_statistics_(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "slab_swin_tinny"}, "did you mean 'slab_swin_tiny'"),
        ({"name": "resnet18", "norm": "prepbn"}, "convert_norms_ converts resnet18"),
        ({"name": "pvt_tiny_prepbn", "published": True}, "published windows are Swin's alone"),
        ({"name": "resnet18", "out_indices": (1, 2)}, r"needs maps of strides \(4, 8, 16, 32\)"),
        ({"name": "resnet18", "embed_dim": 3}, r"resnet18 refuses its arguments \(.*embed_dim"),
        ({"name": "deit_micro", "patch_size": 2}, "got a stride of 2"),
        ({"name": "slab_swin_tiny", "output_norm": "groupnorm", **SMALL_SWIN}, "unknown norm 'groupnorm'"),
    ],
    ids=["name", "norm", "published", "strides", "argument", "patch", "output_norm"],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(**arguments)


def test_output_norms_are_published_ones_unless_asked_for_otherwise():
    def kinds(name: str, **arguments: object) -> set[str]:
        backbone: Backbone = create_backbone(name, **FAMILIES[name], **arguments)
        return {type(norm).__name__ for norm in backbone.output_norms}

    assert kinds("slab_swin_tiny") == {"LayerNorm"}
    assert kinds("pvt_tiny_prepbn") == {"Identity"}
    assert kinds("slab_swin_tiny", output_norm="prepbn") == {"PRepBN"}
    assert kinds("slab_swin_tiny", output_norm="none") == {"Identity"}


def test_the_layernorm_baseline_has_no_other_norm():
    baseline = create_backbone("slab_swin_tiny", norm="layernorm", attention="SSSS", **SMALL_SWIN)
    assert not repbn_modules(baseline)
    assert sum(isinstance(module, nn.LayerNorm) for module in baseline.modules()) == 1 + 2 * 5 + 3 + 4
