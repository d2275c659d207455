"""Initial weights of a detector's own parts, as published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def init_detector_(detector: Any) -> None:
    """Redraw everything but the backbone of a torchvision detector, in place.

    Feature pyramid and hidden layers of the box head: Xavier uniform. Convolutions of the proposal network and class
    logits: normal of 0.01; box codes of 0.001; mask head: Kaiming normal over outputs. Biases are 0.
    """
    fpn, rpn, heads = detector.backbone.fpn, detector.rpn.head, detector.roi_heads
    for weight, _ in _weights(fpn, heads.box_head):
        nn.init.xavier_uniform_(weight)
    for weight, _ in _weights(rpn, heads.box_predictor.cls_score):
        nn.init.normal_(weight, std=0.01)
    for weight, _ in _weights(heads.box_predictor.bbox_pred):
        nn.init.normal_(weight, std=0.001)
    for weight, _ in _weights(heads.mask_head, heads.mask_predictor) if heads.has_mask() else ():
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    for _, bias in _weights(fpn, rpn, heads):
        nn.init.zeros_(bias)


def _weights(*parents: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of every layer inside."""
    for module in (module for parent in parents for module in parent.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            assert module.bias is not None
            yield module.weight, module.bias
