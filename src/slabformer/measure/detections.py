"""How far the detections of two detectors are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from slabformer.surgery.verify import VerificationError

Detection = dict[str, Tensor]


@dataclass(frozen=True)
class DetectionAgreement:
    """How far the detections of two detectors are apart, on one image or on several.

    Attributes:
        num_images: Compared.
        num_detections: Found by the first.
        max_pixels: Largest distance of a box's edge.
        max_score: Largest difference of a score.
        max_mask: Largest difference of a mask's probability; 0 without masks.
    """

    num_images: int
    num_detections: int
    max_pixels: float
    max_score: float
    max_mask: float


def agreement_of(expected: Detection, actual: Detection, where: str) -> DetectionAgreement:
    """Of one image. Detections are paired by label and place, since equal scores may come in another order.

    Args:
        expected: "boxes", "labels", "scores", and "masks" if there are any.
        actual: The same of the other detector.
        where: The image, for errors.

    Raises:
        VerificationError: If one finds what the other does not.
    """
    if not torch.equal(expected["labels"].sort().values, actual["labels"].sort().values):
        raise VerificationError(
            f"{where}: {len(expected['labels'])} detections became {len(actual['labels'])}, or changed their labels"
        )
    if not len(expected["labels"]):
        return DetectionAgreement(1, 0, 0.0, 0.0, 0.0)
    overlaps = box_iou(expected["boxes"], actual["boxes"])
    overlaps[expected["labels"][:, None] != actual["labels"]] = -1
    partner = overlaps.argmax(1)
    if len(partner.unique()) != len(partner):
        raise VerificationError(f"{where}: other boxes are found")

    def furthest(key: str) -> float:
        return (expected[key] - actual[key][partner]).abs().max().item()

    masks = furthest("masks") if "masks" in expected else 0.0
    return DetectionAgreement(1, len(partner), furthest("boxes"), furthest("scores"), masks)


def agreement_over(agreements: Sequence[DetectionAgreement], pixels: float) -> DetectionAgreement:
    """The worst over all images.

    Args:
        agreements: Of each.
        pixels: Largest distance of a box's edge that passes.

    Raises:
        VerificationError: If boxes lie further apart.
        ValueError: If there is no image.
    """
    if not agreements:
        raise ValueError("detections are compared on one image at least, got none")
    result = DetectionAgreement(
        num_images=len(agreements),
        num_detections=sum(one.num_detections for one in agreements),
        max_pixels=max(one.max_pixels for one in agreements),
        max_score=max(one.max_score for one in agreements),
        max_mask=max(one.max_mask for one in agreements),
    )
    if not result.max_pixels <= pixels:
        raise VerificationError(f"boxes differ by {result.max_pixels:.3g} pixels (at most {pixels:.3g} allowed)")
    return result
