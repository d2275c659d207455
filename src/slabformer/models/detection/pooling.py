"""Features of boxes from the levels of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from slabformer.models.detection.separable_align import is_cheaper, separable_roi_align


class PyramidRoIAlign(nn.Module):
    """Aligned RoIAlign on the level that suits a box: the ``i``-th up to ``finest_scale * 2 ** (i + 1)`` pixels.

    torchvision's ``MultiScaleRoIAlign`` is off by half a pixel (its ``aligned`` is False) and takes the levels' scales
    from the first batch that comes along, for good.

    Args:
        strides: Pixels to a cell of each level, finest first.
        output_size: Side of the features.
        finest_scale: Side of a box, in pixels, from which on the second level takes over at twice as many.
        sampling_ratio: Samples to a bin on either axis; 0 for as many as the bin has cells, as published, at over twice
            the time of 2.

    Shape:
        Maps by name, ``(B, C, h, w)`` each, and boxes ``(n, 4)`` in pixels for each image to
        ``(sum of n, C, output_size, output_size)``. Maps beyond ``strides`` are not read.
    """

    def __init__(self, strides: Sequence[int], output_size: int, finest_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.strides, self.output_size = tuple(strides), output_size
        self.finest_scale, self.sampling_ratio = finest_scale, sampling_ratio

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """Features of all boxes; ``image_shapes`` is there for torchvision's callers."""
        maps = list(x.values())[: len(self.strides)]
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
        rois = rois.nan_to_num(0.0)  # torchvision would crash, where training is to say that a loss is not finite
        level_of = self.levels(rois[:, 1:])
        chosen = [torch.where(level_of == level)[0] for level in range(len(maps))]
        pooled = [
            self.pool(features, rois[index], 1 / stride)
            for features, stride, index in zip(maps, self.strides, chosen, strict=True)
        ]
        return torch.cat(pooled)[torch.cat(chosen).argsort()]  # back in the order of the boxes

    def pool(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        """Features of the boxes ``(n, 5)`` on one level, images ascending."""
        if is_cheaper(features, self.sampling_ratio):
            return separable_roi_align(features, rois, self.output_size, scale, self.sampling_ratio)
        size = (self.output_size, self.output_size)
        return roi_align(features, rois, size, scale, self.sampling_ratio, aligned=True)

    def levels(self, boxes: Tensor) -> Tensor:
        """Level of each box ``(n, 4)``, as an index ``(n,)``."""
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        levels = torch.floor(torch.log2(sides / self.finest_scale + 1e-6)).nan_to_num(0.0)  # of an inverted box
        return levels.clamp(0, len(self.strides) - 1).long()

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"strides={self.strides}, output_size={self.output_size}, finest_scale={self.finest_scale:g}, "
            f"sampling_ratio={self.sampling_ratio}"
        )
