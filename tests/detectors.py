"""Micro detectors, pictures and objects for tests of detection."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slabformer as sf
from slabformer.models.detection.backbones import create_backbone
from slabformer.models.detection.config import DetectorConfig
from slabformer.models.detection.mask_rcnn import Detector, build_detector
from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.fuse import FuseReport
from slabformer.tasks.detection.saved import DetectorInfo, save_detector

#: arguments of small models, by family
SMALL: dict[str, dict[str, Any]] = {
    "cswin": {"embed_dim": 8, "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "img_size": 64},
    "swin": {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 2, 1), "img_size": 64},
    "pvt": {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "img_size": 64},
    "deit": {"embed_dim": 32, "num_heads": 2, "depth": 3, "img_size": 64},
}
SMALL_SWIN = SMALL["swin"]
#: some maps divide into windows of 7 tokens, some do not; and none is padded to a multiple of 32 already
ODD_SIZES = ((97, 130), (64, 75), (151, 60))


def small_config(**settings: Any) -> DetectorConfig:
    """A detector of a few thousand parameters for three kinds of objects of 10 to 60 pixels."""
    small: dict[str, Any] = {
        "num_classes": 3,
        "fpn_channels": 16,
        "anchor_scale": 4.0,
        "rpn_candidates_train": 60,
        "rpn_candidates_test": 60,
        "rpn_proposals_train": 60,
        "rpn_proposals_test": 60,
        "roi_num_samples": 32,
        "roi_finest_scale": 28.0,
        "roi_sampling_ratio": 2,
        "box_fc_dim": 32,
        "mask_num_convs": 1,
        "mask_channels": 8,
        "max_detections": 10,
    }
    return DetectorConfig(**small | settings)


def small_detector(name: str = "slab_swin_tiny", backbone: dict[str, Any] | None = None, **settings: Any) -> Detector:
    """A fresh detector in train mode; ``backbone`` holds arguments beside those of a small model."""
    arguments = next(small for family, small in SMALL.items() if family in name) | (backbone or {})
    return build_detector(create_backbone(name, **arguments), small_config(**settings))


def trained_looking(detector: Detector, seed: int = 0) -> Detector:
    """Every norm redrawn, gamma 0, scores spread out so that there are detections; in eval mode."""
    sf.testing.randomize_norms_(detector, seed)
    for norm in prepbn_modules(detector).values():
        norm.set_gamma(0.0)
    with torch.no_grad():
        for layer in (detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred):
            layer.weight.mul_(20)
        for layer in (detector.roi_heads.box_predictor.cls_score, detector.roi_heads.box_predictor.bbox_pred):
            layer.weight.mul_(50)
    return detector.eval()


def without_folding(detector: Detector, *, keep: Sequence[str] = ()) -> tuple[Detector, FuseReport]:
    """In place of ``fuse_detector``: every norm as an Affine, made at once."""
    made = copy.deepcopy(detector)
    for name, norm in prepbn_modules(detector).items():
        made.set_submodule(name, norm.fuse())
    return made, FuseReport(())


def saved(path: Path, detector: Detector | None = None, **backbone: Any) -> Path:
    """A detector on a small SLAB-Swin with ``backbone`` arguments in a file at ``path``; a trained-looking one."""
    detector = detector or trained_looking(small_detector(backbone=backbone))
    info = DetectorInfo(
        backbone="slab_swin_tiny",
        backbone_args=SMALL_SWIN | backbone,
        detector=detector.config,
        class_names=["cat", "dog", "emu"],
        category_ids=[3, 5, 8],
        size=64,
        max_size=96,
    )
    save_detector(detector, path, info)
    return path


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Images ``(3, H, W)`` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def objects(count: int, size: tuple[int, int], seed: int = 0, num_classes: int = 3) -> dict[str, Tensor]:
    """Boxes of 10 to 30 pixels whose masks are their left halves."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([size[1], size[0]]) - 31)
    boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=generator)], 1)
    masks = torch.zeros(count, *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().long().tolist(), strict=True):
        mask[top:bottom, left : (left + right) // 2] = 1
    labels = torch.randint(1, num_classes + 1, (count,), generator=generator)
    return {"boxes": boxes, "labels": labels, "masks": masks}
