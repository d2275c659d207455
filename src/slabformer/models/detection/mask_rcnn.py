"""Mask R-CNN and Faster R-CNN on torchvision's parts, as published: any backbone, images at their given size."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from slabformer.models.detection.anchors import PyramidAnchors
from slabformer.models.detection.config import DetectorConfig
from slabformer.models.detection.feature_pyramid import FPN_STRIDES, PyramidBackbone
from slabformer.models.detection.init import init_detector_
from slabformer.models.detection.pooling import PyramidRoIAlign
from slabformer.models.detection.roi_heads import RegionHeads
from slabformer.models.detection.rpn import FullPrecisionRPNHead, ProposalNetwork
from slabformer.models.detection.token_pyramid import STRIDES

#: images are padded to a multiple of it
SIZE_DIVISIBLE = 32
#: side of a box's features, for boxes and for masks; masks come out at twice theirs
BOX_SIDE, MASK_SIDE = 7, 14


class GivenSizeTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation and batching, without its resizing before and its pasting of masks behind."""

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        """Nothing: whoever loads an image resizes it."""
        return image, target

    def postprocess(self, result: list[dict], image_shapes: object, original_image_sizes: object) -> list[dict]:
        """Nothing: see :func:`slabformer.models.detection.paste.paste_masks`."""
        return result


class Detector(GeneralizedRCNN):
    """torchvision's skeleton of Mask R-CNN (He et al. 2017) with this package's parts; see :func:`build_detector`.

    Args:
        backbone: See :func:`slabformer.models.detection.backbones.create_backbone`.
        config: All else.

    Shape:
        A list of images ``(3, H, W)`` in [0, 1], red first, each of any size. In training with targets, dicts of
        "boxes" ``(n, 4)`` as left, top, right, bottom in pixels, "labels" ``(n,)`` of 1 to ``num_classes``, and "masks"
        ``(n, H, W)`` of 0 and 1; ``n`` may be 0. Losses come back by name. In eval mode a list of dicts of "boxes" in
        pixels of the given image, "labels", "scores", highest first, and "masks" ``(n, 1, 28, 28)``: probabilities
        inside the boxes.

    Raises:
        ValueError: If targets are missing in training, or parts of them.
    """

    def __init__(self, backbone: nn.Module, config: DetectorConfig) -> None:
        anchors = PyramidAnchors(FPN_STRIDES, config.anchor_scale, config.anchor_ratios)
        super().__init__(
            PyramidBackbone(backbone, config.fpn_channels),
            _proposal_network(anchors, config),
            _region_heads(config),
            GivenSizeTransform(0, 0, list(config.image_mean), list(config.image_std), SIZE_DIVISIBLE),
        )
        self.config = config
        init_detector_(self)


def build_detector(backbone: nn.Module, config: DetectorConfig) -> Detector:
    """A detector with fresh heads on ``backbone``, in train mode."""
    return Detector(backbone, config)


def _proposal_network(anchors: PyramidAnchors, config: DetectorConfig) -> ProposalNetwork:
    head = FullPrecisionRPNHead(config.fpn_channels, anchors.num_anchors_per_location()[0])
    return ProposalNetwork(
        anchor_generator=anchors,
        head=head,
        fg_iou_thresh=config.rpn_positive_iou,
        bg_iou_thresh=config.rpn_negative_iou,
        min_best=config.rpn_best_iou,
        batch_size_per_image=config.rpn_num_samples,
        positive_fraction=config.rpn_positive_fraction,
        pre_nms_top_n={"training": config.rpn_candidates_train, "testing": config.rpn_candidates_test},
        post_nms_top_n={"training": config.rpn_proposals_train, "testing": config.rpn_proposals_test},
        nms_thresh=config.rpn_nms_iou,
        size_divisible=SIZE_DIVISIBLE,
    )


def _region_heads(config: DetectorConfig) -> RegionHeads:
    num_outputs = config.num_classes + 1
    heads = RegionHeads(
        box_roi_pool=_pool(BOX_SIDE, config),
        box_head=TwoMLPHead(config.fpn_channels * BOX_SIDE**2, config.box_fc_dim),
        box_predictor=FastRCNNPredictor(config.box_fc_dim, num_outputs),
        fg_iou_thresh=config.roi_iou,
        bg_iou_thresh=config.roi_iou,
        min_best=config.roi_iou,
        batch_size_per_image=config.roi_num_samples,
        positive_fraction=config.roi_positive_fraction,
        bbox_reg_weights=config.box_code_weights,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_iou,
        detections_per_img=config.max_detections,
    )
    if config.masks:
        channels = [config.mask_channels] * config.mask_num_convs
        heads.mask_roi_pool = _pool(MASK_SIDE, config)
        heads.mask_head = MaskRCNNHeads(config.fpn_channels, channels, dilation=1)
        last = channels[-1] if channels else config.fpn_channels
        heads.mask_predictor = MaskRCNNPredictor(last, config.mask_channels, num_outputs)
    return heads


def _pool(side: int, config: DetectorConfig) -> PyramidRoIAlign:
    return PyramidRoIAlign(STRIDES, side, config.roi_finest_scale, config.roi_sampling_ratio)
