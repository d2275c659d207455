"""A detector as a function of one image of one size whose every shape is known beforehand: what exporters can take.

Where torchvision filters boxes, scores become -1 here, and the best of a fixed number are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import nms, roi_align

from slabformer._defaults import MAX_CANDIDATES
from slabformer.models.detection.mask_rcnn import SIZE_DIVISIBLE, Detector
from slabformer.models.detection.pooling import PyramidRoIAlign

Size = tuple[int, int]

#: score of a box that is none
NOTHING = -1.0
#: sides in pixels below which torchvision drops a proposal and a detection
SMALLEST_PROPOSAL, SMALLEST_DETECTION = 1e-3, 1e-2


class StaticDetector(nn.Module):
    """A :class:`Detector` for one image on a canvas of fixed size.

    Its detections are the detector's, for an image that shares its batch with one as large as the canvas. One thing
    is approximate: of more than ``max_candidates`` boxes above the score threshold the least are dropped before
    suppression instead of after.

    Args:
        detector: In eval mode; copied.
        size: Canvas ``(H, W)``; rounded up to a multiple of 32.
        max_candidates: Boxes of all classes that enter the last suppression.

    Attributes:
        size: The canvas.

    Shape:
        ``image`` ``(3, H, W)`` in [0, 1], red first: the picture at the top left, the mean colour around it; and
        ``size`` ``(2,)``, height and width of the picture. To "boxes" ``(D, 4)`` in pixels, "labels" ``(D,)``, "scores"
        ``(D,)``, highest first, -1 where there is no more, and with masks "masks" ``(D, 1, 28, 28)``: probabilities
        inside the boxes.
    """

    #: see :mod:`slabformer.deployment.kinds`
    deployed_as = "detector"

    mean: Tensor
    std: Tensor
    anchors: Tensor

    def __init__(self, detector: Detector, size: Size, max_candidates: int = MAX_CANDIDATES) -> None:
        super().__init__()
        height, width = (side + -side % SIZE_DIVISIBLE for side in size)
        self.size: Size = (height, width)
        self.max_candidates = max_candidates
        self.detector = copy.deepcopy(detector)
        _fit_tables(self.detector, self.size)
        config = detector.config
        self.register_buffer("mean", torch.tensor(config.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1))
        with torch.no_grad():
            levels = list(self.detector.backbone(torch.zeros(1, 3, *self.size)).values())
            images = ImageList(torch.zeros(1, 3, *self.size), [self.size])
            self.register_buffer("anchors", self.detector.rpn.anchor_generator(images, levels)[0])
        self.num_anchors = [len(config.anchor_ratios) * x.shape[2] * x.shape[3] for x in levels]
        self.eval()

    def forward(self, image: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Boxes, labels, scores, and masks where the detector has them."""
        levels = self.detector.backbone(((image - self.mean) / self.std)[None])
        proposals, found = self.propose(levels, size)
        boxes, labels, scores = self.classify(levels, proposals, found, size)
        outputs = {"boxes": boxes, "labels": labels, "scores": scores}
        if self.detector.roi_heads.has_mask():
            outputs["masks"] = self.segment(levels, boxes, labels)
        return outputs

    def inputs(self, image: Tensor) -> dict[str, Tensor]:
        """An image ``(3, h, w)`` in [0, 1] of up to the canvas's size, as the forward takes it."""
        return {"image": on_canvas(image, self.size, self.mean), "size": torch.tensor(image.shape[1:])}

    def propose(self, levels: dict[str, Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals ``(P, 4)``, and whether each is one."""
        rpn = self.detector.rpn
        objectness, codes = concat_box_prediction_layers(*rpn.head(list(levels.values())))
        scores, boxes = [], []
        anchors = self.anchors.split(self.num_anchors)
        for score, code, anchor in zip(
            objectness.flatten().split(self.num_anchors), codes.split(self.num_anchors), anchors, strict=True
        ):
            best = score.topk(min(rpn.pre_nms_top_n(), len(score))).indices
            box = _clipped(rpn.box_coder.decode_single(code[best], anchor[best]), size)
            score = torch.where(_is_large(box, SMALLEST_PROPOSAL), score[best].sigmoid(), NOTHING)
            scores.append(_suppressed(box, score, rpn.nms_thresh))
            boxes.append(box)
        score, box = torch.cat(scores), torch.cat(boxes)
        score, best = score.topk(min(rpn.post_nms_top_n(), len(score)))
        return box[best], score > NOTHING

    def classify(
        self, levels: dict[str, Tensor], proposals: Tensor, found: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes ``(D, 4)``, labels ``(D,)`` and scores ``(D,)`` of the best detections."""
        heads = self.detector.roi_heads
        features = pooled(heads.box_roi_pool, levels, proposals)
        logits, codes = heads.box_predictor(heads.box_head(features))
        boxes = _clipped(heads.box_coder.decode_single(codes, proposals).view(-1, 4), size)
        num_classes = logits.shape[1]
        scores = torch.where(found[:, None], logits.softmax(1), NOTHING)
        labels = torch.arange(num_classes, device=logits.device).expand_as(scores)
        # class 0 is background
        scores, labels = scores[:, 1:].reshape(-1), labels[:, 1:].reshape(-1)
        boxes = boxes.view(-1, num_classes, 4)[:, 1:].reshape(-1, 4)
        wanted = (scores > heads.score_thresh) & _is_large(boxes, SMALLEST_DETECTION)
        scores = torch.where(wanted, scores, NOTHING)
        scores, best = scores.topk(min(self.max_candidates, len(scores)))
        boxes, labels = boxes[best], labels[best]
        # boxes of different classes are moved apart, so that one suppression serves all
        apart = labels[:, None].to(boxes.dtype) * (max(self.size) + 1)
        scores = _suppressed(boxes + apart, scores, heads.nms_thresh)
        scores, best = scores.topk(min(heads.detections_per_img, len(scores)))
        return boxes[best], labels[best], scores

    def segment(self, levels: dict[str, Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Masks ``(D, 1, 28, 28)``."""
        heads = self.detector.roi_heads
        logits = heads.mask_predictor(heads.mask_head(pooled(heads.mask_roi_pool, levels, boxes)))
        index = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        return logits.gather(1, index).sigmoid()


def on_canvas(image: Tensor, size: Size, mean: Tensor) -> Tensor:
    """``image`` ``(3, h, w)`` at the top left of the mean colour ``(3, 1, 1)``, which becomes 0: ``(3, *size)``."""
    canvas = mean.expand(3, *size).clone()
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def pooled(pool: PyramidRoIAlign, levels: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """What ``pool`` returns for one image, without lists of boxes whose length only the data know.

    Every box is pooled from every level, but as an empty one where it is not its own.
    """
    level_of = pool.levels(boxes)[:, None]
    size = (pool.output_size, pool.output_size)
    out: Tensor | float = 0.0
    for level, (features, stride) in enumerate(zip(levels.values(), pool.strides, strict=False)):
        own = level_of == level
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), torch.where(own, boxes, 0.0)], 1)
        part = roi_align(features, rois, size, 1 / stride, pool.sampling_ratio, aligned=True)
        out = out + torch.where(own[:, :, None, None], part, 0.0)
    assert isinstance(out, Tensor)
    return out


def _suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Scores, :data:`NOTHING` where a better box overlaps by more than ``threshold``."""
    kept = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, nms(boxes, scores, threshold), True)
    return torch.where(kept, scores, NOTHING)


def _clipped(boxes: Tensor, size: Tensor) -> Tensor:
    limits = size.flip(0).repeat(2).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)


def _is_large(boxes: Tensor, side: float) -> Tensor:
    return ((boxes[:, 2:] - boxes[:, :2]) >= side).all(1)


def _fit_tables(detector: Detector, size: Sequence[int]) -> None:
    """Resample position tables once instead of in every call, where the backbone has a method for that."""
    body = detector.backbone.body.body
    resize = getattr(body, "set_input_size", None)
    if resize is not None:
        resize(tuple(size))
