"""Everything about a detector that is not its backbone; the defaults are the published ones."""

from __future__ import annotations

from dataclasses import dataclass

_POSITIVE = (
    *("num_classes", "fpn_channels", "anchor_scale", "rpn_num_samples", "rpn_candidates_train", "rpn_candidates_test"),
    *("rpn_proposals_train", "rpn_proposals_test", "roi_num_samples", "roi_finest_scale", "box_fc_dim"),
    *("mask_channels", "max_detections"),
)
_OVERLAPS = ("rpn_positive_iou", "rpn_negative_iou", "rpn_best_iou", "roi_iou", "rpn_nms_iou", "nms_iou")


@dataclass(kw_only=True)
class DetectorConfig:
    """Mask R-CNN, or Faster R-CNN without masks, on a feature pyramid."""

    num_classes: int = 80
    """Kinds of objects, without background."""
    masks: bool = True
    """Whether to predict masks; False for data with boxes alone."""
    fpn_channels: int = 256
    """Channels of the feature pyramid."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from images in [0, 1], red first."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides images after that."""

    anchor_scale: float = 8.0
    """Side of a square anchor over the stride of its level, 4 to 64 pixels."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Heights of anchors over their widths."""
    rpn_positive_iou: float = 0.7
    """Overlap with an object from which an anchor is positive."""
    rpn_negative_iou: float = 0.3
    """Overlap with all objects below which it is negative."""
    rpn_best_iou: float = 0.3
    """Overlap from which an object takes the anchors that overlap it most, whatever the two above."""
    rpn_num_samples: int = 256
    """Anchors of an image that the losses are computed over."""
    rpn_positive_fraction: float = 0.5
    """Share of positive ones among them, at most."""
    rpn_candidates_train: int = 2000
    """Best anchors of each level that become proposals in training, before suppression."""
    rpn_candidates_test: int = 1000
    """The same in evaluation."""
    rpn_proposals_train: int = 1000
    """Proposals of an image after suppression, all levels together, in training."""
    rpn_proposals_test: int = 1000
    """The same in evaluation."""
    rpn_nms_iou: float = 0.7
    """Overlap above which the lesser of two proposals of a level goes."""

    roi_iou: float = 0.5
    """Overlap with an object from which a proposal stands for it, and below which for background."""
    roi_num_samples: int = 512
    """Proposals of an image that the losses are computed over."""
    roi_positive_fraction: float = 0.25
    """Share of those that stand for objects, at most."""
    roi_finest_scale: float = 56.0
    """Side in pixels of a box up to twice which features come from the finest level, and so on in octaves."""
    roi_sampling_ratio: int = 0
    """Samples to a bin of a box's features on either axis; 0 for as many as it has cells. 2 halves the time."""
    box_fc_dim: int = 1024
    """Width of the two hidden layers that classify boxes."""
    box_code_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scales of a box's four codes: inverse standard deviations of x, y, width and height."""
    mask_num_convs: int = 4
    """Convolutions of the mask head."""
    mask_channels: int = 256
    """Their channels."""

    score_threshold: float = 0.05
    """Detections of a lower score are dropped."""
    nms_iou: float = 0.5
    """Overlap above which the lesser of two detections of a class goes."""
    max_detections: int = 100
    """Detections of an image."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: With the field's name.
        """
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in _OVERLAPS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou must not exceed rpn_positive_iou, got {self.rpn_negative_iou} and "
                f"{self.rpn_positive_iou}"
            )
        if not self.anchor_ratios or min(self.anchor_ratios) <= 0:
            raise ValueError(f"anchor_ratios must be positive numbers, got {self.anchor_ratios}")
