from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN

from detectors import ODD_SIZES, objects, pictures, small_config, small_detector, trained_looking
from slabformer.models.detection.backbones import create_backbone
from slabformer.models.detection.config import DetectorConfig
from slabformer.models.detection.mask_rcnn import build_detector
from tolerances import EXACT, FLOAT32, assert_close

LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


def test_the_published_detector_has_the_published_size():
    ours = build_detector(create_backbone("resnet18"), DetectorConfig())
    torchvision = MaskRCNN(ours.backbone, 81)
    for part in ("rpn", "roi_heads"):
        shapes = [
            {name: p.shape for name, p in getattr(model, part).named_parameters()} for model in (ours, torchvision)
        ]
        assert shapes[0] == shapes[1]


def test_initial_weights_are_as_published():
    detector = build_detector(create_backbone("resnet18"), DetectorConfig())
    fpn, heads = detector.backbone.fpn, detector.roi_heads
    deviations = {
        fpn.inner_blocks[0][0]: math.sqrt(2 / (64 + 256)),  # Xavier
        fpn.layer_blocks[0][0]: math.sqrt(2 / (256 * 9 + 256 * 9)),
        detector.rpn.head.conv[0][0]: 0.01,
        detector.rpn.head.cls_logits: 0.01,
        heads.box_head.fc6: math.sqrt(2 / (256 * 49 + 1024)),
        heads.box_predictor.cls_score: 0.01,
        heads.box_predictor.bbox_pred: 0.001,
        heads.mask_head[0][0]: math.sqrt(2 / (256 * 9)),  # Kaiming
        heads.mask_predictor.mask_fcn_logits: math.sqrt(2 / 81),
    }
    for layer, deviation in deviations.items():
        assert abs(layer.weight.std().item() / deviation - 1) < 0.1
    for layer in detector.modules():
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)) or layer in deviations:
            assert not layer.bias.any()


@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (0, 0)], ids=["objects", "one_without", "none"])
def test_every_loss_reaches_its_parameters(counts):
    detector = small_detector()
    images = pictures(*ODD_SIZES[:2])
    targets = [objects(n, size, seed=n) for n, size in zip(counts, ODD_SIZES, strict=False)]
    losses = detector(images, targets)
    assert losses.keys() == LOSSES
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    without = {name for name, p in detector.named_parameters() if p.grad is None}
    assert not without, "a parameter without gradient makes ranks wait for each other"


def test_boxes_alone_need_no_masks():
    detector = small_detector(masks=False)
    target = objects(2, (64, 64))
    del target["masks"]
    assert detector(pictures((64, 64)), [target]).keys() == LOSSES - {"loss_mask"}
    (found,) = trained_looking(detector)(pictures((64, 64)))
    assert found.keys() == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("missing", ["targets", "masks"])
def test_missing_targets_are_refused(missing):
    target = objects(1, (64, 64))
    target.pop(missing, None)
    with pytest.raises((ValueError, AssertionError), match=missing):
        small_detector()(pictures((64, 64)), None if missing == "targets" else [target])


@torch.no_grad()
def test_detections_lie_in_the_given_image_best_first():
    images = pictures(*ODD_SIZES)
    for image, found in zip(images, trained_looking(small_detector())(images), strict=True):
        count = len(found["boxes"])
        assert 0 < count <= 10
        assert found["masks"].shape == (count, 1, 28, 28)
        assert ((found["masks"] >= 0) & (found["masks"] <= 1)).all()
        assert found["boxes"].min() >= 0
        assert (found["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
        assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
        assert set(found["labels"].tolist()) <= {1, 2, 3}


@torch.no_grad()
def test_images_of_one_size_do_not_change_each_others_detections():
    detector, images = trained_looking(small_detector()), pictures((97, 130), (97, 130))
    together, alone = detector(images), [detector([image])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        assert_close(one["boxes"], other["boxes"], FLOAT32)


def test_under_autocast_boxes_and_losses_stay_in_float32():
    detector, target = small_detector(), objects(3, (64, 96))
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(pictures((64, 96)), [target])
        with torch.no_grad():
            (found,) = trained_looking(detector)(pictures((64, 96)))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {found[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float()), "boxes were rounded on their way"


def test_activation_checkpointing_changes_no_gradient():
    detector, target = small_detector(), objects(3, (64, 96))

    def gradient() -> torch.Tensor:
        torch.manual_seed(1)  # of the samplers
        detector.zero_grad()
        sum(detector(pictures((64, 96)), [target]).values()).backward()
        return detector.backbone.body.body.patch_embed.proj.weight.grad.clone()

    plain = gradient()
    detector.backbone.body.set_grad_checkpointing()
    assert_close(gradient(), plain, EXACT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"nms_iou": 1.5}, r"nms_iou must be in \[0, 1\], got 1.5"),
        ({"rpn_negative_iou": 0.8}, "rpn_negative_iou must not exceed rpn_positive_iou"),
        ({"anchor_ratios": ()}, "anchor_ratios must not be empty"),
    ],
    ids=["classes", "overlap", "order", "ratios"],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_config(**settings)
