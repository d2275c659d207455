"""Fuse the norms of a detector's backbone, and hold its detections against those of the detector as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from slabformer._defaults import PIXELS
from slabformer.measure.detections import DetectionAgreement, agreement_of, agreement_over
from slabformer.models.detection.mask_rcnn import Detector
from slabformer.surgery.fuse import FuseReport, fuse

Size = tuple[int, int]

#: what the backbone is traced at: other sizes pad other maps, and folds hold for all
TRACED: tuple[Size, ...] = ((224, 224), (192, 320))


def fuse_detector(
    detector: Detector, sizes: Sequence[Size] = TRACED, *, keep: Sequence[str] = ()
) -> tuple[Detector, FuseReport]:
    """Fold the norms of ``detector``'s backbone into their neighbours, on a copy; detections do not change.

    Backbone and feature pyramid are fused in one piece, so that output norms fold into the pyramid unless they are
    LayerNorms. What comes behind has no norms.

    Args:
        detector: In eval mode.
        sizes: Heights and widths of images, multiples of 32, that the backbone is traced at.
        keep: Modules of the backbone whose outputs must stay, as :func:`slabformer.fuse` takes them.

    Raises:
        ValueError: As :func:`slabformer.fuse`.
    """
    device = next(detector.parameters()).device
    examples = [torch.randn(1, 3, *size, device=device) for size in sizes]
    backbone, report = fuse(detector.backbone, examples, keep=keep)
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
        agreements.append(agreement_of(expected, actual, f"image {i} of {tuple(image.shape[1:])} pixels"))
    return agreement_over(agreements, pixels)
