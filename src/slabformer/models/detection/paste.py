"""Detections from the size a detector saw to the size of the picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]

#: pixels of all masks that are sampled at once; 64 bytes each are in use then
CHUNK = 2**22


def rescale_boxes(boxes: Tensor, from_size: Size, to_size: Size) -> Tensor:
    """Boxes ``(n, 4)`` in pixels of an image ``(H, W)`` in pixels of the same image at another size."""
    height, width = (new / old for new, old in zip(to_size, from_size, strict=True))
    return boxes * boxes.new_tensor([width, height, width, height])


def paste_masks(masks: Tensor, boxes: Tensor, image_size: Size, threshold: float = 0.5) -> Tensor:
    """Masks of boxes as masks of the whole image: bilinear at the centre of every pixel, then cut.

    Args:
        masks: Probabilities inside the boxes, ``(n, 1, side, side)``.
        boxes: In pixels of the image, ``(n, 4)``.
        image_size: ``(H, W)``.
        threshold: A pixel of at least so much is in.

    Returns:
        Boolean ``(n, H, W)``.
    """
    height, width = image_size
    step = max(1, CHUNK // max(1, height * width))
    pasted = [_paste(*part, image_size, threshold) for part in zip(masks.split(step), boxes.split(step), strict=True)]
    return torch.cat(pasted) if len(masks) else masks.new_zeros(0, height, width, dtype=torch.bool)


def _paste(masks: Tensor, boxes: Tensor, image_size: Size, threshold: float) -> Tensor:
    x, y = (_places(boxes[:, i], boxes[:, i + 2], image_size[1 - i]) for i in range(2))
    grid = torch.stack([x[:, None, :].expand(-1, image_size[0], -1), y[:, :, None].expand(-1, -1, image_size[1])], -1)
    # outside of the box there is nothing
    return F.grid_sample(masks.float(), grid, align_corners=False)[:, 0] >= threshold


def _places(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Centres of pixels in coordinates of the box, from -1 at ``start`` to 1 at ``end``: ``(n, length)``."""
    centres = torch.arange(length, device=start.device) + 0.5
    size = (end - start).clamp(min=torch.finfo(start.dtype).eps)[:, None]
    return ((centres - start[:, None]) / size * 2 - 1).float()
