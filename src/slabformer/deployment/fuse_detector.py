"""Fuse the norms of a detector's backbone, and hold its detections against those of the detector as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from slabformer.models.detection.mask_rcnn import Detector
from slabformer.surgery.fuse import FuseReport, fuse
from slabformer.surgery.verify import VerificationError

Detection = dict[str, Tensor]
Size = tuple[int, int]

#: what the backbone is traced at: other sizes pad other maps, and folds hold for all
TRACED: tuple[Size, ...] = ((224, 224), (192, 320))
#: largest distance of a box's edge, in pixels, that passes
PIXELS = 1e-3


@dataclass(frozen=True)
class DetectionAgreement:
    """How far the detections of two detectors are apart.

    Attributes:
        num_images: Compared.
        num_detections: Found by the first.
        max_pixels: Largest distance of a box's edge.
        max_score: Largest difference of a score.
        max_mask: Largest difference of a mask's probability; None without masks.
    """

    num_images: int
    num_detections: int
    max_pixels: float
    max_score: float
    max_mask: float | None


def fuse_detector(detector: Detector, sizes: Sequence[Size] = TRACED) -> tuple[Detector, FuseReport]:
    """Fold the norms of ``detector``'s backbone into their neighbours, on a copy; detections do not change.

    Backbone and feature pyramid are fused in one piece, so that output norms fold into the pyramid unless they are
    LayerNorms. What comes behind has no norms.

    Args:
        detector: In eval mode.
        sizes: Heights and widths of images, multiples of 32, that the backbone is traced at.

    Raises:
        ValueError: As :func:`slabformer.fuse`.
    """
    device = next(detector.parameters()).device
    examples = [torch.randn(1, 3, *size, device=device) for size in sizes]
    backbone, report = fuse(detector.backbone, examples)
    # as if the detector's own backbone had been copied before
    return copy.deepcopy(detector, {id(detector.backbone): backbone}), report


@torch.no_grad()
def verify_detections(
    reference: Detector, candidate: Detector, images: Iterable[Tensor], pixels: float = PIXELS
) -> DetectionAgreement:
    """Compare the detections of two detectors, each image by itself, in float64: the same boxes and labels.

    In float32 detections that tie for a threshold would come and go by themselves.

    Args:
        reference: What is right.
        candidate: What should equal it.
        images: ``(3, H, W)`` in [0, 1], of any sizes.
        pixels: Largest distance of a box's edge that passes.

    Raises:
        VerificationError: If one finds what the other does not, or boxes lie further apart.
        ValueError: If there is no image.
    """
    pair = [copy.deepcopy(detector).double().eval() for detector in (reference, candidate)]
    agreements = []
    for i, image in enumerate(images):
        (expected,), (actual,) = (detector([image.double()]) for detector in pair)
        agreements.append(_agreement(expected, actual, f"image {i} of {tuple(image.shape[1:])} pixels"))
    if not agreements:
        raise ValueError("verify_detections needs at least one image")
    masks = [agreement.max_mask for agreement in agreements if agreement.max_mask is not None]
    result = DetectionAgreement(
        num_images=len(agreements),
        num_detections=sum(agreement.num_detections for agreement in agreements),
        max_pixels=max(agreement.max_pixels for agreement in agreements),
        max_score=max(agreement.max_score for agreement in agreements),
        max_mask=max(masks, default=None),
    )
    if not result.max_pixels <= pixels:
        raise VerificationError(f"boxes differ by {result.max_pixels:.3g} pixels (at most {pixels:.3g} allowed)")
    return result


def _agreement(expected: Detection, actual: Detection, where: str) -> DetectionAgreement:
    """Of one image; detections are paired by label and place, since equal scores may come in another order."""
    if not torch.equal(expected["labels"].sort().values, actual["labels"].sort().values):
        raise VerificationError(
            f"{where}: {len(expected['labels'])} detections became {len(actual['labels'])}, or changed their labels"
        )
    if not len(expected["labels"]):
        return DetectionAgreement(1, 0, 0.0, 0.0, 0.0 if "masks" in expected else None)
    overlaps = box_iou(expected["boxes"], actual["boxes"])
    overlaps[expected["labels"][:, None] != actual["labels"]] = -1
    partner = overlaps.argmax(1)
    if len(partner.unique()) != len(partner):
        raise VerificationError(f"{where}: other boxes are found")

    def furthest(key: str) -> float:
        return (expected[key] - actual[key][partner]).abs().max().item()

    return DetectionAgreement(
        1, len(partner), furthest("boxes"), furthest("scores"), furthest("masks") if "masks" in expected else None
    )
