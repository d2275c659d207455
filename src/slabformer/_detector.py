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
    """Number of classes, without background."""
    masks: bool = True
    """Predict masks; switch off for data with boxes alone."""
    fpn_channels: PositiveInt = 256
    """Channels of the feature pyramid."""
    image_mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    """Mean that is subtracted from RGB values in [0, 1]."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Standard deviation that the result is divided by."""

    anchor_scale: PositiveFloat = 8.0
    """Side of a square anchor over the stride of its level (4 to 64 pixels)."""
    anchor_ratios: Annotated[tuple[PositiveFloat, ...], NotEmpty()] = (0.5, 1.0, 2.0)
    """Ratios of an anchor's height to its width."""
    rpn_positive_iou: Fraction = 0.7
    """An anchor is positive if its IoU with an object is at least this."""
    rpn_negative_iou: Fraction = 0.3
    """An anchor is negative if its IoU with every object is below this."""
    rpn_best_iou: Fraction = 0.3
    """The anchors with the highest IoU with an object are positive if that IoU is at least this, whatever the two
    thresholds above."""
    rpn_num_samples: PositiveInt = 256
    """Anchors per image that the losses are computed over."""
    rpn_positive_fraction: Fraction = 0.5
    """Largest share of positive anchors among them."""
    rpn_candidates_train: PositiveInt = 2000
    """Best anchors per level that are kept before non-maximum suppression, in training."""
    rpn_candidates_test: PositiveInt = 1000
    """The same in evaluation."""
    rpn_proposals_train: PositiveInt = 1000
    """Proposals per image after non-maximum suppression, over all levels, in training."""
    rpn_proposals_test: PositiveInt = 1000
    """The same in evaluation."""
    rpn_nms_iou: Fraction = 0.7
    """IoU above which the lower-scoring of two proposals of a level is suppressed."""

    roi_iou: Fraction = 0.5
    """A proposal is assigned to an object if their IoU is at least this, and to the background otherwise."""
    roi_num_samples: PositiveInt = 512
    """Proposals per image that the losses are computed over."""
    roi_positive_fraction: Fraction = 0.25
    """Largest share of proposals that are assigned to objects among them."""
    roi_finest_scale: PositiveFloat = 56.0
    """Boxes with a side below twice this, in pixels, are read from the finest level; each coarser level takes the next
    octave."""
    roi_sampling_ratio: NonNegativeInt = 0
    """Samples per bin along each axis when a box's features are read; 0 adapts to the box's size. 2 halves the time."""
    box_fc_dim: PositiveInt = 1024
    """Width of the two hidden layers of the box head."""
    box_code_weights: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (10.0, 10.0, 5.0, 5.0)
    """Weights of a box's four regression targets x, y, width and height: their inverse standard deviations."""
    mask_num_convs: NonNegativeInt = 4
    """Number of convolutions in the mask head."""
    mask_channels: PositiveInt = 256
    """Channels of the mask head."""

    score_threshold: Fraction = 0.05
    """Detections with a lower score are dropped."""
    nms_iou: Fraction = 0.5
    """IoU above which the lower-scoring of two detections of a class is suppressed."""
    max_detections: PositiveInt = 100
    """Largest number of detections per image."""

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
