"""Everything about a detector that is not its backbone; the defaults are the published ones.

Not among the models, which import timm: options and recipes are checked before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from slabformer.settings import Fraction, NonNegativeInt, NotEmpty, Number, PositiveFloat, PositiveInt, Settings


@dataclass(kw_only=True)
class DetectorConfig(Settings):
    """Mask R-CNN, or Faster R-CNN without masks, on a feature pyramid."""

    num_classes: PositiveInt = 80
    """Kinds of objects, without background."""
    masks: bool = True
    """Whether to predict masks; False for data with boxes alone."""
    fpn_channels: PositiveInt = 256
    """Channels of the feature pyramid."""
    image_mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    """Subtracted from images in [0, 1], red first."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Divides images after that."""

    anchor_scale: PositiveFloat = 8.0
    """Side of a square anchor over the stride of its level, 4 to 64 pixels."""
    anchor_ratios: Annotated[tuple[PositiveFloat, ...], NotEmpty()] = (0.5, 1.0, 2.0)
    """Heights of anchors over their widths."""
    rpn_positive_iou: Fraction = 0.7
    """Overlap with an object from which an anchor is positive."""
    rpn_negative_iou: Fraction = 0.3
    """Overlap with all objects below which it is negative."""
    rpn_best_iou: Fraction = 0.3
    """Overlap from which an object takes the anchors that overlap it most, whatever the two above."""
    rpn_num_samples: PositiveInt = 256
    """Anchors of an image that the losses are computed over."""
    rpn_positive_fraction: Fraction = 0.5
    """Share of positive ones among them, at most."""
    rpn_candidates_train: PositiveInt = 2000
    """Best anchors of each level that become proposals in training, before suppression."""
    rpn_candidates_test: PositiveInt = 1000
    """The same in evaluation."""
    rpn_proposals_train: PositiveInt = 1000
    """Proposals of an image after suppression, all levels together, in training."""
    rpn_proposals_test: PositiveInt = 1000
    """The same in evaluation."""
    rpn_nms_iou: Fraction = 0.7
    """Overlap above which the lesser of two proposals of a level goes."""

    roi_iou: Fraction = 0.5
    """Overlap with an object from which a proposal stands for it, and below which for background."""
    roi_num_samples: PositiveInt = 512
    """Proposals of an image that the losses are computed over."""
    roi_positive_fraction: Fraction = 0.25
    """Share of those that stand for objects, at most."""
    roi_finest_scale: PositiveFloat = 56.0
    """Side in pixels of a box up to twice which features come from the finest level, and so on in octaves."""
    roi_sampling_ratio: NonNegativeInt = 0
    """Samples to a bin of a box's features on either axis; 0 for as many as it has cells. 2 halves the time."""
    box_fc_dim: PositiveInt = 1024
    """Width of the two hidden layers that classify boxes."""
    box_code_weights: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (10.0, 10.0, 5.0, 5.0)
    """Scales of a box's four codes: inverse standard deviations of x, y, width and height."""
    mask_num_convs: NonNegativeInt = 4
    """Convolutions of the mask head."""
    mask_channels: PositiveInt = 256
    """Their channels."""

    score_threshold: Fraction = 0.05
    """Detections of a lower score are dropped."""
    nms_iou: Fraction = 0.5
    """Overlap above which the lesser of two detections of a class goes."""
    max_detections: PositiveInt = 100
    """Detections of an image."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: With the field's name.
        """
        super().__post_init__()
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou must not exceed rpn_positive_iou, got {self.rpn_negative_iou} and "
                f"{self.rpn_positive_iou}"
            )
