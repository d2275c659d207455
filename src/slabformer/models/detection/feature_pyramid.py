"""A backbone and the feature pyramid on it, as torchvision's detectors take them."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from slabformer.models.detection.token_pyramid import STRIDES

#: pixels to a cell of each level, with the one that is subsampled from the last
FPN_STRIDES = (*STRIDES, 2 * STRIDES[-1])


class PyramidBackbone(nn.Module):
    """A backbone and its feature pyramid (Lin et al. 2017): what :func:`slabformer.fuse` takes in one piece.

    Output norms end in the pyramid's first convolutions, so that they fold too, unless they are LayerNorms.

    Args:
        body: Backbone, see :func:`slabformer.models.detection.backbones.create_backbone`.
        out_channels: Channels of every level.

    Shape:
        Images ``(B, 3, H, W)``, normalised, to levels "0" to "3" and "pool", ``(B, out_channels, h, w)`` each, of
        strides 4, 8, 16, 32 and 64.
    """

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        channels = list(body.num_channels)  # type: ignore[arg-type]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images to levels by name."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))
