"""Objects on a picture: boxes, masks, and labels that can be read."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

MASK_ALPHA = 0.45
#: hue from one class to the next: far apart, and never the same twice
GOLDEN_RATIO = 0.618034
#: heights of labels and widths of lines, as shares of the picture's longer side
TEXT_SHARE, LINE_SHARE = 1 / 50, 1 / 400
SMALLEST_TEXT = 10
#: from this luminance on a colour is written on in black, below in white
BRIGHT = 128


def draw_objects(
    picture: Tensor, boxes: Tensor, labels: Tensor, captions: Sequence[str], masks: Tensor | None = None
) -> Tensor:
    """A copy of ``picture`` with objects drawn on it, a colour a class, the first object on top.

    Args:
        picture: uint8 ``(3, H, W)``.
        boxes: Left, top, right, bottom in its pixels, ``(n, 4)``.
        labels: Classes, ``(n,)``; they choose the colours.
        captions: What to write above the boxes.
        masks: ``(n, H, W)`` of bool.

    Returns:
        uint8 ``(3, H, W)``.
    """
    if not len(boxes):
        return picture.clone()
    boxes, labels, captions = boxes.flip(0), labels.flip(0), captions[::-1]
    colours = [class_colour(label) for label in labels.tolist()]
    longest = max(picture.shape[-2:])
    if masks is not None:
        picture = draw_segmentation_masks(picture, masks.flip(0), alpha=MASK_ALPHA, colors=colours)
    picture = draw_bounding_boxes(picture, boxes, colors=colours, width=max(1, round(longest * LINE_SHARE)))
    return _write(picture, boxes, captions, colours, max(SMALLEST_TEXT, round(longest * TEXT_SHARE)))


def class_colour(label: int) -> tuple[int, int, int]:
    """A bright colour, the same for a class on all pictures."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_RATIO % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def tile(pictures: Sequence[Tensor], columns: int, gap: int = 4) -> Tensor:
    """Pictures of any sizes as a grid on white, each at the top left of its cell: uint8 ``(3, H, W)``."""
    height, width = (max(picture.shape[axis] for picture in pictures) + gap for axis in (1, 2))
    rows = -(-len(pictures) // columns)
    grid = torch.full((3, rows * height, min(columns, len(pictures)) * width), 255, dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        grid[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return grid


def to_pil(picture: Tensor) -> Image.Image:
    """uint8 ``(3, H, W)`` as a picture to save."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def _write(
    picture: Tensor, boxes: Tensor, captions: Sequence[str], colours: Sequence[tuple[int, int, int]], size: int
) -> Tensor:
    """Captions on their class's colour, above the box or inside where there is no room above."""
    canvas = to_pil(picture)
    drawing, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    for (left, top, *_), caption, colour in zip(boxes.tolist(), captions, colours, strict=True):
        width, height = drawing.textlength(caption, font) + 4, size * 1.25
        x = max(0, min(left, canvas.width - width))
        y = top - height if top >= height else top
        drawing.rectangle((x, y, x + width, y + height), fill=colour)
        drawing.text((x + 2, y), caption, fill=_readable_on(colour), font=font)
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def _readable_on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue >= BRIGHT else "white"
