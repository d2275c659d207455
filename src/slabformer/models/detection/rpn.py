"""The region proposal network, with assignment and losses as published."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from slabformer.models.detection.coding import ClampedBoxCoder
from slabformer.models.detection.matching import MaxIoUMatcher
from slabformer.ops.moments import accumulation_dtype

Target = dict[str, Tensor]


class FullPrecisionRPNHead(RPNHead):
    """torchvision's head whose outputs leave autocast: a box in bfloat16 is known to 4 pixels of 1000."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps to objectness and box codes of each level."""
        return tuple([y.to(accumulation_dtype(y.dtype)) for y in ys] for ys in super().forward(x))  # type: ignore[return-value]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's ``RegionProposalNetwork`` with the published coder, matcher, L1 loss and treatment of padding.

    Args:
        fg_iou_thresh: Overlap with an object from which an anchor is positive.
        bg_iou_thresh: Overlap with all objects below which it is negative.
        min_best: Overlap from which an object takes its best anchors, see :class:`MaxIoUMatcher`.
        size_divisible: What an image by itself would be padded to; anchors beyond are left out.
        kwargs: torchvision's.
    """

    def __init__(
        self, *, fg_iou_thresh: float, bg_iou_thresh: float, min_best: float, size_divisible: int, **kwargs: Any
    ) -> None:
        super().__init__(fg_iou_thresh=fg_iou_thresh, bg_iou_thresh=bg_iou_thresh, **kwargs)
        self.box_coder = ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = MaxIoUMatcher(fg_iou_thresh, bg_iou_thresh, min_best)
        self.size_divisible = size_divisible

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals ``(n, 4)`` in pixels for each image, and in training the losses."""
        levels = list(features.values())
        objectness, codes = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        num_anchors = [level[0].numel() for level in objectness]
        objectness, codes = concat_box_prediction_layers(objectness, codes)
        decoded = self.box_coder.decode(codes.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = self.filter_proposals(decoded, objectness, images.image_sizes, num_anchors)
        if not self.training:
            return proposals, {}
        if targets is None:
            raise ValueError("a detector in train mode needs targets; call eval() for detections")
        matched = [self.match(a, t["boxes"], s) for a, t, s in zip(anchors, targets, images.image_sizes, strict=True)]
        labels, boxes = (list(part) for part in zip(*matched, strict=True))
        loss_objectness, loss_box = self.compute_loss(objectness, codes, labels, self.box_coder.encode(boxes, anchors))
        return proposals, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}

    def match(self, anchors: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What anchors of one image stand for.

        Args:
            anchors: ``(num_anchors, 4)``.
            boxes: Of the objects, ``(n, 4)``.
            image_size: ``(H, W)`` before padding.

        Returns:
            Labels ``(num_anchors,)``: 1, 0 for background, -1 for left out; and their boxes ``(num_anchors, 4)``.
        """
        inside = self.inside(anchors, image_size)
        if not len(boxes):
            return inside.to(anchors.dtype) - 1, torch.zeros_like(anchors)
        # an anchor beyond the image must not be the best for an object either
        overlaps = torch.where(inside, self.box_similarity(boxes, anchors), -1.0)
        matches = self.proposal_matcher(overlaps)
        labels = (matches >= 0).to(anchors.dtype)
        left_out = (matches == self.proposal_matcher.BETWEEN_THRESHOLDS) | ~inside
        return labels.masked_fill(left_out, -1.0), boxes.to(anchors.dtype)[matches.clamp(min=0)]

    def inside(self, anchors: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Whether anchors are centred in the image as it would be padded by itself, whatever else is in the batch."""
        height, width = (side + -side % self.size_divisible for side in image_size)
        x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
        # centres lie at multiples of the stride, up to rounding
        return (x < width - 0.5) & (y < height - 0.5)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy and L1 of sampled anchors, both over their number."""
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        (positive,), (sampled,) = torch.where(positive), torch.where(positive | negative)
        count = max(1, len(sampled))
        targets = torch.cat(labels)[sampled]
        loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], targets, reduction="sum")
        errors = pred_bbox_deltas[positive] - torch.cat(regression_targets)[positive]
        return loss / count, errors.abs().sum() / count
