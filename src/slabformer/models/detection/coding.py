"""Boxes as shifts and scales of other boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from slabformer._torchvision import BoxCoder


class ClampedBoxCoder(BoxCoder):
    """torchvision's coder, with scales clamped from below as well as from above, as published.

    A box is never decoded to more than 62.5 times its reference, nor to less than a 62.5th.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Codes ``(N, 4 * K)`` of ``K`` classes against boxes ``(N, 4)`` to boxes ``(N, 4 * K)``."""
        shift, size = rel_codes.unflatten(-1, (-1, 2, 2)).unbind(-2)
        # codes are multiples of the weights
        floor = size.new_tensor([-weight * self.bbox_xform_clip for weight in self.weights[2:]])
        clamped = torch.stack([shift, torch.maximum(size, floor)], -2).flatten(-3)
        return super().decode_single(clamped, boxes)
