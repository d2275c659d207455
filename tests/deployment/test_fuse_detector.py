from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slabformer as sf
from detectors import ODD_SIZES, pictures, small_detector, trained_looking
from slabformer.deployment.detector import fuse_detector, verify_detections
from slabformer.nn import PRepBN, RepBN


def lots_of(detector):
    """The same detector, with as many detections as it may have."""
    detector.roi_heads.score_thresh = 0.0
    return detector


@pytest.mark.parametrize(
    ("output_norm", "published", "layernorms"),
    [
        pytest.param("layernorm", False, 4, marks=pytest.mark.slow),
        ("prepbn", False, 0),
        pytest.param("prepbn", True, 0, marks=pytest.mark.slow),
    ],
    ids=["layernorm", "none_left", "published_windows"],
)
def test_every_norm_goes_and_every_detection_stays(output_norm, published, layernorms):
    backbone = {"output_norm": output_norm, "published": published}
    detector = lots_of(trained_looking(small_detector(backbone=backbone)))
    fused, report = fuse_detector(detector, [(64, 96)])
    assert report.num_kept == 0
    assert not any(isinstance(module, (PRepBN, RepBN)) for module in fused.modules())
    assert sum(isinstance(module, nn.LayerNorm) for module in fused.modules()) == layernorms
    assert any(isinstance(module, PRepBN) for module in detector.modules())
    # sizes that pad windows in other places than the one that was traced
    agreement = verify_detections(detector, fused, pictures(*ODD_SIZES, (200, 320)))
    assert agreement.num_detections == 4 * 10
    assert 0 < agreement.max_pixels < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pvt_tiny_prepbn", "slab_pvt_tiny", "slab_cswin_tiny", "slab_deit_tiny"])
def test_every_family_fuses(name):
    detector = lots_of(trained_looking(small_detector(name)))
    fused, report = fuse_detector(detector)
    assert report.num_kept == 0
    assert verify_detections(detector, fused, pictures(*ODD_SIZES)).num_detections == 30


@pytest.fixture(scope="module")
def detector():
    """One that finds as much as it may."""
    return lots_of(trained_looking(small_detector()))


def test_a_detector_agrees_with_itself(detector):
    agreement = verify_detections(detector, detector, pictures((64, 75)))
    assert agreement.num_detections == 10
    assert agreement.max_pixels == agreement.max_score == agreement.max_mask == 0


@torch.no_grad()
def test_moved_boxes_are_refused(detector):
    moved = copy.deepcopy(detector)
    moved.roi_heads.box_predictor.bbox_pred.bias += 1e-3
    with pytest.raises(sf.VerificationError, match=r"boxes differ by .* pixels \(at most 0.001 allowed\)"):
        verify_detections(detector, moved, pictures((64, 75)))
    assert verify_detections(detector, moved, pictures((64, 75)), pixels=0.1).max_pixels > 1e-3


@torch.no_grad()
def test_other_labels_are_refused(detector):
    other = copy.deepcopy(detector)
    other.roi_heads.box_predictor.cls_score.bias[1] += 100
    with pytest.raises(sf.VerificationError, match="changed their labels"):
        verify_detections(detector, other, pictures((64, 75)))


def test_no_image_shows_nothing(detector):
    with pytest.raises(ValueError, match="one image at least"):
        verify_detections(detector, detector, [])
