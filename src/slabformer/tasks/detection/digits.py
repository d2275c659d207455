"""Digits pasted on photographs, with boxes and masks: a detection data set out of what scikit-learn brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slabformer._extras import require
from slabformer._files import errors_of, workspace
from slabformer.tasks.classification.digits import CLASS_NAMES, DigitsSource
from slabformer.tasks.detection.annotations import encode_mask
from slabformer.tasks.detection.config import NUM_IMAGES, Split

#: where COCO keeps images and annotations of a split, below a root folder
LAYOUT = {
    "train": ("train2017", "annotations/instances_train2017.json"),
    "validation": ("val2017", "annotations/instances_val2017.json"),
}
PHOTOS = ("china.jpg", "flower.jpg")
IMAGE_SIZE = 128
#: sides of a digit in pixels, of images of 128
SMALLEST, LARGEST = 24, 56
MOST_DIGITS, PLACES_TRIED = 5, 20
#: share of ink from which a pixel belongs to a digit
INK = 0.35


def make_digits(
    split: Split, *, num_images: int | None = None, seed: int = 0, image_size: int = IMAGE_SIZE
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Images of one to five coloured digits that do not overlap, on random crops of two photographs.

    Training and validation images show different digits. Image ``i`` depends on (seed, split, i) alone.

    Args:
        split: "train" or "validation".
        num_images: 500 and 100 by default.
        seed: Of everything random.
        image_size: Side of the images in pixels.

    Returns:
        The contents of a COCO annotation file, masks as RLE, and the images, uint8 ``(image_size, image_size, 3)``.

    Raises:
        ImportError: If scikit-learn or pycocotools is missing; names the extra that brings it.
    """
    digits = DigitsSource(split)
    load_photo = require("sklearn.datasets", extra="train").load_sample_image
    photos = [Image.fromarray(load_photo(name)) for name in PHOTOS]
    pictures, images, annotations = [], [], list[dict[str, Any]]()
    for index in range(NUM_IMAGES[split] if num_images is None else num_images):
        rng = np.random.default_rng((seed, split == "validation", index))
        picture = _random_crop(photos[rng.integers(len(photos))], image_size, rng)
        for label, mask in _paste_digits(picture, digits, rng):
            row = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label, "iscrowd": 0}
            annotations.append({**row, "bbox": _tight_box(mask), "area": int(mask.sum())})
            annotations[-1]["segmentation"] = encode_mask(mask)
        images.append({"id": index + 1, "file_name": f"{index:06}.png", "height": image_size, "width": image_size})
        pictures.append(picture.round().astype(np.uint8))
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}, pictures


def write_digits(
    folder: Path, *, num_train: int | None = None, num_validation: int | None = None, seed: int = 0
) -> None:
    """Write both splits of :func:`make_digits` to ``folder`` as COCO lays its files out; all of it or nothing.

    Raises:
        FileExistsError: If there is something at ``folder``.
        OSError: If it cannot be written, naming ``folder``.
    """
    if folder.exists():
        raise FileExistsError(f"{str(folder)!r} is there already; name a folder that is not, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with errors_of(folder), workspace(folder.parent) as place:
        unfinished = place / folder.name
        unfinished.mkdir()
        _write_split(unfinished, "train", num_train, seed)
        _write_split(unfinished, "validation", num_validation, seed)
        unfinished.rename(folder)


def _write_split(root: Path, split: Split, num_images: int | None, seed: int) -> None:
    dataset, pictures = make_digits(split, num_images=num_images, seed=seed)
    images, annotations = (root / part for part in LAYOUT[split])
    images.mkdir()
    annotations.parent.mkdir(exist_ok=True)
    for row, picture in zip(dataset["images"], pictures, strict=True):
        Image.fromarray(picture).save(images / row["file_name"])
    annotations.write_text(json.dumps(dataset), encoding="utf-8")


def _random_crop(photo: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(min(size, *photo.size), min(photo.size) + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.asarray(crop, dtype=np.float32).copy()


def _paste_digits(picture: np.ndarray, digits: DigitsSource, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    """Paint digits into ``picture``; the class and the mask ``(H, W)`` of every one that found room."""
    size = len(picture)
    taken = np.zeros((size, size), dtype=bool)
    pasted = []
    for _ in range(rng.integers(1, MOST_DIGITS + 1)):
        index = rng.integers(len(digits))
        side = int(rng.integers(SMALLEST, LARGEST + 1) * size / IMAGE_SIZE)
        colour = rng.integers(256, size=3)
        place = _free_place(taken, side, rng)
        if place is None:
            continue
        taken[place] = True
        grey = Image.fromarray(digits.images[index]).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(grey, dtype=np.float32)[..., None] / 255
        picture[place] += ink * (colour - picture[place])
        mask = np.zeros((size, size), dtype=np.uint8)
        mask[place] = ink[..., 0] > INK
        pasted.append((int(digits.labels[index]), mask))
    return pasted


def _free_place(taken: np.ndarray, side: int, rng: np.random.Generator) -> tuple[slice, slice] | None:
    for _ in range(PLACES_TRIED):
        top, left = (int(rng.integers(length - side + 1)) for length in taken.shape)
        place = slice(top, top + side), slice(left, left + side)
        if not taken[place].any():
            return place
    return None


def _tight_box(mask: np.ndarray) -> list[int]:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
