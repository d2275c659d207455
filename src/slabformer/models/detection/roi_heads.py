"""The heads on proposals, with assignment and losses as published."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import roi_align

from slabformer.models.detection.coding import ClampedBoxCoder
from slabformer.models.detection.matching import MaxIoUMatcher
from slabformer.ops.moments import accumulation_dtype

Target = dict[str, Tensor]
Weights = tuple[float, float, float, float]


class RegionHeads(RoIHeads):
    """torchvision's ``RoIHeads`` with the published coder, matcher, L1 loss and mask targets, in full precision.

    Args:
        fg_iou_thresh: Overlap with an object from which a proposal stands for it.
        bg_iou_thresh: Overlap with all objects below which it stands for background.
        min_best: Overlap from which an object takes its best proposals, see :class:`MaxIoUMatcher`.
        bbox_reg_weights: Scales of a box's codes.
        kwargs: torchvision's.
    """

    def __init__(
        self, *, fg_iou_thresh: float, bg_iou_thresh: float, min_best: float, bbox_reg_weights: Weights, **kwargs: Any
    ) -> None:
        super().__init__(
            fg_iou_thresh=fg_iou_thresh, bg_iou_thresh=bg_iou_thresh, bbox_reg_weights=bbox_reg_weights, **kwargs
        )
        self.box_coder = ClampedBoxCoder(bbox_reg_weights)
        self.proposal_matcher = MaxIoUMatcher(fg_iou_thresh, bg_iou_thresh, min_best)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image, without losses; in training losses, without detections."""
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        logits, codes = self.classify(features, proposals, image_shapes)
        found = zip(*self.postprocess_detections(logits, codes, proposals, image_shapes), strict=True)
        results = [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in found]
        if self.has_mask():
            mask_logits = self.segment(features, [result["boxes"] for result in results], image_shapes)
            masks = maskrcnn_inference(mask_logits, [result["labels"] for result in results])
            for result, mask in zip(results, masks, strict=True):
                result["masks"] = mask
        return results, {}

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None,
    ) -> dict[str, Tensor]:
        """Losses of sampled proposals; masks count where a proposal stands for an object."""
        proposals, matches, labels, codes = self.select_training_samples(proposals, targets)
        logits, predicted = self.classify(features, proposals, image_shapes)
        loss_classifier, loss_box = box_losses(logits, predicted, torch.cat(labels), torch.cat(codes))
        losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box}
        if self.has_mask():
            assert targets is not None
            positive = [label > 0 for label in labels]
            boxes, matches, labels = (
                [part[keep] for part, keep in zip(parts, positive, strict=True)]
                for parts in (proposals, matches, labels)
            )
            mask_logits = self.segment(features, boxes, image_shapes)
            side = mask_logits.shape[-1]
            cut = [mask_targets(t["masks"], b, m, side) for t, b, m in zip(targets, boxes, matches, strict=True)]
            losses["loss_mask"] = mask_loss(mask_logits, torch.cat(labels), torch.cat(cut))
        return losses

    def classify(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits ``(N, K + 1)``, background first, and box codes ``(N, 4 * (K + 1))`` of all images' boxes."""
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        return _full_precision(logits), _full_precision(codes)

    def segment(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Mask logits ``(N, K + 1, 28, 28)`` of all images' boxes."""
        return _full_precision(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))))


def box_losses(logits: Tensor, codes: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and L1 of proposals, both over the number of all of them.

    Args:
        logits: ``(N, K + 1)``.
        codes: ``(N, 4 * (K + 1))``; those of the labelled class count.
        labels: ``(N,)``, 0 for background, whose boxes do not count.
        targets: Codes of the matched boxes, ``(N, 4)``.
    """
    (positive,) = torch.where(labels > 0)
    predicted = codes.unflatten(1, (-1, 4))[positive, labels[positive]]
    loss_box = (predicted - targets[positive]).abs().sum() / max(1, len(labels))
    return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels)), loss_box


def mask_targets(masks: Tensor, boxes: Tensor, matches: Tensor, side: int) -> Tensor:
    """What masks look like inside boxes: ``(n, side, side)`` of 0 and 1, averaged over a bin, then cut at a half.

    Args:
        masks: Of the image's objects, ``(num_objects, H, W)``.
        boxes: ``(n, 4)``.
        matches: Object of each box, ``(n,)``.
        side: Of the result.
    """
    rois = torch.cat([matches[:, None].to(boxes), boxes], 1)
    shares = roi_align(masks[:, None].to(boxes), rois, (side, side), 1.0, sampling_ratio=0, aligned=True)
    return (shares[:, 0] >= 0.5).to(boxes.dtype)


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of masks of the labelled class; 0, with a gradient, where there are none.

    Args:
        logits: ``(N, K + 1, side, side)``.
        labels: ``(N,)``.
        targets: ``(N, side, side)`` of 0 and 1.
    """
    chosen = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(chosen, targets, reduction="sum") / max(1, targets.numel())


def _full_precision(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))
