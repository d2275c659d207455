"""From an image with its objects to the detector's input: the published pipelines on torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from slabformer.tasks.detection.config import DetectionAugment

#: an image and its "boxes", "labels" and "masks"
Example = tuple[tv_tensors.Image, dict[str, Any]]
Transform = Callable[[tv_tensors.Image, dict[str, Any]], Example]


class ResizeKeepRatio(v2.Transform):
    """Resize to a shorter side drawn from ``sizes``, or to less where the longer side would exceed ``max_size``.

    Sides are rounded to the nearest pixel (torchvision rounds down), images are bilinear without antialiasing, masks
    nearest, as published.

    Args:
        sizes: Shorter sides, in pixels.
        max_size: Largest longer side.
    """

    def __init__(self, sizes: tuple[int, ...], max_size: int) -> None:
        super().__init__()
        self.sizes, self.max_size = sizes, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        height, width = v2.query_size(flat_inputs)
        short = self.sizes[int(torch.randint(len(self.sizes), ()))]
        return {"size": keep_ratio((height, width), short, self.max_size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image, boxes or masks."""
        resized = F.resize(inpt, list(params["size"]), v2.InterpolationMode.BILINEAR, antialias=False)
        return F.clamp_bounding_boxes(resized) if isinstance(inpt, tv_tensors.BoundingBoxes) else resized


class RandomRangeCrop(v2.Transform):
    """Crop to a height and a width drawn from a range, at a random place; it may show no object at all.

    Args:
        smallest: Least side; a smaller image keeps its own.
        largest: Largest side.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw size and place."""
        lengths = v2.query_size(flat_inputs)
        height, width = (_draw(min(length, self.smallest), min(length, self.largest)) for length in lengths)
        top, left = (_draw(0, length - side) for length, side in zip(lengths, (height, width), strict=True))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut an image, boxes or masks; boxes outside are left without width or height."""
        return F.crop(inpt, **params)


def train_transform(augment: DetectionAugment) -> Transform:
    """The pipeline of ``augment``; images come out as float32 in [0, 1].

    Raises:
        ValueError: If a setting makes no sense.
    """
    flip = v2.RandomHorizontalFlip(augment.flip)
    if augment.policy == "none":
        return eval_transform(augment)
    if augment.policy == "single":
        return _pipeline(ResizeKeepRatio((augment.size,), augment.max_size), flip)
    resize = ResizeKeepRatio(augment.sizes, augment.max_size)
    shrink = ResizeKeepRatio(augment.crop_sizes, augment.max_size)
    cropped = v2.Compose([shrink, RandomRangeCrop(*augment.crop_range), resize])
    return _pipeline(flip, v2.RandomChoice([resize, cropped]))


def eval_transform(augment: DetectionAugment) -> Transform:
    """Resize to a shorter side of ``size``, the longer held to ``max_size``; float32 in [0, 1]."""
    return _pipeline(ResizeKeepRatio((augment.size,), augment.max_size))


def keep_ratio(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Height and width whose shorter side is ``short``, or whose longer side is ``long`` if that is less."""
    factor = min(long / max(size), short / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    return height, width


def as_example(image: Tensor, boxes: Tensor, labels: Tensor, masks: Tensor | None) -> Example:
    """Tensors as torchvision's transforms know them apart.

    Args:
        image: uint8 ``(3, H, W)``.
        boxes: Left, top, right, bottom in pixels, ``(n, 4)``.
        labels: ``(n,)``.
        masks: uint8 ``(n, H, W)``.
    """
    size: Any = image.shape[-2:]
    target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size), "labels": labels}  # type: ignore[call-overload]
    return tv_tensors.Image(image), target if masks is None else {**target, "masks": tv_tensors.Mask(masks)}


def drop_empty(target: dict[str, Any]) -> dict[str, Tensor]:
    """``target`` as plain tensors without the objects whose box has lost its width or height."""
    boxes = target["boxes"]
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {name: value.as_subclass(Tensor)[kept] for name, value in target.items()}


def _pipeline(*steps: v2.Transform) -> Transform:
    return v2.Compose([*steps, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])


def _draw(lowest: int, highest: int) -> int:
    return int(torch.randint(lowest, highest + 1, ()))
