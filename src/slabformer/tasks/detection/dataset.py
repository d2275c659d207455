"""Images with their objects by (epoch, index), from COCO files or the embedded digits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from slabformer.tasks.detection.annotations import (
    NOT_EVALUATED,
    SMALLEST_SIDE,
    CocoAnnotations,
    CocoImage,
    has_mask,
    read_coco,
)
from slabformer.tasks.detection.config import DetectionData, Split
from slabformer.tasks.detection.digits import LAYOUT, make_digits
from slabformer.tasks.detection.transforms import Example, Transform, as_example, drop_empty
from slabformer.tasks.engine.seeds import draws_from
from slabformer.tasks.images import Failure, candidates, first_readable, most_unreadable, read_image
from slabformer.tasks.paths import path_inside

logger = logging.getLogger(__name__)
CHECK = "`slab detect check-data` tells more"


class Source(NamedTuple):
    """Annotations, and how to get at an image: upright RGB."""

    annotations: CocoAnnotations
    read: Callable[[CocoImage], Image.Image]
    images: list[CocoImage]


def open_source(data: DetectionData, split: Split) -> Source:
    """The images of ``split``: all of them for "validation", those fit to train on for "train".

    Raises:
        FileNotFoundError: If annotations, the folder, or more images than ``max_unreadable`` are missing.
        ValueError: If the annotations are damaged, have no masks though asked for, or leave nothing to train on.
    """
    annotations, read = _open_digits(split) if data.embedded else _open_files(data, split)
    images = _trainable(annotations) if split == "train" else annotations.images
    if split == "validation":
        _tell_of_harder_objects(annotations)
    rows = [row for image in images for row in annotations.usable(image)] if split == "train" else annotations.truth()
    unmasked = [row["id"] for row in rows if not has_mask(row)] if data.masks else []
    if unmasked:
        raise ValueError(
            f"{len(unmasked)} of {len(rows)} annotations in {annotations.name} have no mask (first: id {unmasked[0]}); "
            "use boxes alone with data.masks=false, or remove them"
        )
    return Source(annotations, read, images)


def locate(data: DetectionData, split: Split) -> tuple[Path, Path]:
    """Folder of images and annotation file of ``split``."""
    images, annotations = (Path(data.path, usual) for usual in LAYOUT[split])
    if split == "train":
        return Path(data.train_images or images), Path(data.train_annotations or annotations)
    return Path(data.val_images or images), Path(data.val_annotations or annotations)


def _open_digits(split: Split) -> tuple[CocoAnnotations, Callable[[CocoImage], Image.Image]]:
    # made anew in each process, in a second or two: a cache would want a place to write and could be stale
    dataset, pictures = make_digits(split)
    by_id = {row["id"]: picture for row, picture in zip(dataset["images"], pictures, strict=True)}
    return CocoAnnotations(dataset, f"digits/{split}"), partial(_embedded, by_id)


def _open_files(data: DetectionData, split: Split) -> tuple[CocoAnnotations, Callable[[CocoImage], Image.Image]]:
    folder, file = locate(data, split)
    annotations = CocoAnnotations(read_coco(file), str(file))
    if not folder.is_dir():
        setting = "data.train_images" if split == "train" else "data.val_images"
        raise FileNotFoundError(f"no folder {str(folder)!r} with the images of {file}; name theirs as {setting}")
    missing = [image.file_name for image in annotations.images if not _path_of(folder, image, file).is_file()]
    allowed = most_unreadable(data.max_unreadable, len(annotations.images))
    if len(missing) > allowed:
        raise FileNotFoundError(
            f"{len(missing)} of {len(annotations.images)} images of {file} are not in {str(folder)!r} "
            f"(first: {missing[0]}); data.max_unreadable allows {allowed}"
        )
    return annotations, partial(_read_sized, folder, data.upright)


def _path_of(folder: Path, image: CocoImage, file: Path) -> Path:
    try:
        return path_inside(folder, image.file_name)
    except ValueError as error:
        raise ValueError(f"{file}: file_name of image {image.id}: {error}; {CHECK}") from error


def _embedded(pictures: dict[int, np.ndarray], image: CocoImage) -> Image.Image:
    return Image.fromarray(pictures[image.id])


def _read_sized(folder: Path, upright: bool, image: CocoImage) -> Image.Image:
    picture = read_image(folder / image.file_name, upright=upright)
    if picture.size != (image.width, image.height):
        width, height = picture.size
        lies = "when upright" if upright else "as stored"
        other = "stored" if upright else "exif"
        hint = f"; try data.orientation={other}" if (height, width) == (image.width, image.height) else ""
        raise ValueError(f"it is {width}x{height} {lies}, its annotations are for {image.width}x{image.height}{hint}")
    return picture


def _trainable(annotations: CocoAnnotations) -> list[CocoImage]:
    """Images that are large enough and show an object; says what is left out."""
    small = [image for image in annotations.images if min(image.height, image.width) < SMALLEST_SIDE]
    large = [image for image in annotations.images if min(image.height, image.width) >= SMALLEST_SIDE]
    kept = [image for image in large if annotations.usable(image)]
    counts = {"images without a usable object": len(large) - len(kept), f"images below {SMALLEST_SIDE} px": len(small)}
    counts |= {f"objects {reason}": count for reason, count in sorted(annotations.unusable.items())}
    left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"
    if not kept:
        raise ValueError(f"no image of {annotations.name} can be trained on (left out: {left_out}); {CHECK}")
    if left_out != "nothing":
        logger.info("%s: left out of training: %s", annotations.name, left_out)
    return kept


def _tell_of_harder_objects(annotations: CocoAnnotations) -> None:
    """Say which objects are looked for in evaluation though training leaves their like out."""
    counts = {why: count for why, count in sorted(annotations.unusable.items()) if why not in NOT_EVALUATED}
    if counts:
        objects = ", ".join(f"{count} {why}" for why, count in counts.items())
        logger.info("%s: training would leave these objects out, evaluation counts them: %s", annotations.name, objects)


class Sample(NamedTuple):
    """One image on its way into a batch, and what could not be read on the way."""

    image: Tensor | None
    target: dict[str, Any]
    failures: list[Failure]


class DetectionDataset(Dataset[Sample]):
    """Images and targets by ``(epoch, index)``, so that workers need no state.

    Args:
        source: What to read.
        transform: Draws from the global generators.
        seed: Of the augmentation.
        masks: Whether targets have masks.
        replace: Give another image, drawn from (seed, epoch, index), for one that cannot be read; else none.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, *, masks: bool, replace: bool) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.masks, self.replace = masks, replace

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        images = self.source.images
        tried = candidates(self.seed, epoch, index, len(self), replace=self.replace)
        read, failures = first_readable(tried, lambda i: self._read(images[i]), lambda i: images[i].file_name)
        if read is None:
            return Sample(None, {}, failures)
        example, about = read
        with draws_from(self.seed, epoch, index):
            pixels, target = self.transform(*example)
        return Sample(pixels.as_subclass(Tensor), {**drop_empty(target), **about}, failures)

    def _read(self, image: CocoImage) -> tuple[Example, dict[str, Any]]:
        annotations = self.source.annotations
        picture, rows = self.source.read(image), annotations.usable(image)
        masks = annotations.masks(rows, image) if self.masks else None
        about = {"image_id": image.id, "original_size": (image.height, image.width), "name": image.file_name}
        pixels, boxes, labels = F.pil_to_tensor(picture), annotations.boxes(rows, image), annotations.labels(rows)
        return as_example(pixels, boxes, labels, masks), about
