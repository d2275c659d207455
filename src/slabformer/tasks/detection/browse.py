"""A look at what the detector is trained on: augmented images with their objects."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from slabformer.tasks.detection.drawing import draw_objects, tile
from slabformer.tasks.detection.loader import DetectionLoader

#: longer side of a picture in the grid, in pixels; smaller images are enlarged to be seen
CELL = 320


def browse(loader: DetectionLoader, num_images: int, *, epoch: int = 0, columns: int = 4) -> Tensor:
    """The first ``num_images`` images of an epoch as they are trained on, with boxes, masks and names.

    Args:
        loader: Of either split.
        num_images: How many, at most.
        epoch: Whose order and augmentation.
        columns: Of the grid.

    Returns:
        uint8 ``(3, H, W)``.

    Raises:
        ValueError: If ``num_images`` or ``columns`` is not positive.
    """
    if num_images < 1 or columns < 1:
        raise ValueError(f"num_images and columns must be at least 1, got {num_images} and {columns}")
    loader.set_epoch(epoch)
    cells: list[Tensor] = []
    for batch in loader:
        for image, target in zip(batch.images, batch.targets, strict=True):
            cells.append(_cell(image, target, loader.class_names))
            if len(cells) == num_images:
                return tile(cells, columns)
    return tile(cells, columns)


def _cell(image: Tensor, target: dict, class_names: list[str]) -> Tensor:
    factor = CELL / max(image.shape[-2:])
    size = [round(side * factor) for side in image.shape[-2:]]
    picture = F.resize(F.to_dtype(image, torch.uint8, scale=True), size, antialias=True)
    masks = target.get("masks")
    if masks is not None:
        masks = F.resize(masks, size, F.InterpolationMode.NEAREST).bool()
    names = [class_names[label - 1] for label in target["labels"].tolist()]
    return draw_objects(picture, target["boxes"] * factor, target["labels"], names, masks)
