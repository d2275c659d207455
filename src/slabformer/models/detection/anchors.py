"""Anchors where the published detector has them: at fixed strides, not rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from slabformer.ops.moments import accumulation_dtype


class PyramidAnchors(AnchorGenerator):
    """Anchors of one size and several shapes for each level of a feature pyramid, centred at multiples of its stride.

    torchvision takes padded size over grid for the stride, which is 61 instead of 64 for the top of an image of 800
    pixels, and rounds anchors to whole pixels.

    Args:
        strides: Pixels to a cell of each level.
        scale: Side of a square anchor over its level's stride.
        ratios: Heights over widths.
    """

    def __init__(self, strides: Sequence[int], scale: float, ratios: Sequence[float]) -> None:
        self.strides = tuple(strides)
        super().__init__(tuple((scale * stride,) for stride in strides), (tuple(ratios),) * len(self.strides))

    def generate_anchors(
        self,
        scales: Sequence[float],  # type: ignore[override]  # torchvision says list[int]
        aspect_ratios: Sequence[float],  # type: ignore[override]
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors ``(len(aspect_ratios) * len(scales), 4)`` around the origin."""
        side = torch.as_tensor(scales, dtype=dtype, device=device)
        ratio = torch.as_tensor(aspect_ratios, dtype=dtype, device=device)[:, None]
        width, height = (side / ratio.sqrt()).flatten(), (side * ratio.sqrt()).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors ``(num_anchors, 4)`` of all levels, the same for every image of a batch; never in half precision.

        Raises:
            ValueError: If there are not as many maps as strides.
        """
        if len(feature_maps) != len(self.strides):
            raise ValueError(f"anchors are for {len(self.strides)} levels, got {len(feature_maps)} maps")
        first = feature_maps[0]
        self.set_cell_anchors(accumulation_dtype(first.dtype), first.device)
        grids = [tuple(x.shape[-2:]) for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)
