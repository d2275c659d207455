"""COCO annotation files: images, objects and classes, whatever ids they carry."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slabformer._extras import require
from slabformer.tasks.detection.schema import (
    FEWEST_CORNERS,
    FIELDS,
    PARTS,
    Dataset,
    check_structure,
    problems,
    runs_of,
    without_nulls_,
)
from slabformer.tasks.engine.documents import read_json

#: smaller images are not trained on
SMALLEST_SIDE = 32
#: why an object is not trained on, in the order of asking
IGNORED, UNKNOWN, FLAT, OUTSIDE, CROWD = "marked `ignore`", "of unknown category", "without area", "outside", "crowds"
#: which of them are not asked for in evaluation either: COCO takes crowds for neither found nor missed
NOT_EVALUATED = {UNKNOWN, CROWD}


@dataclass(frozen=True)
class CocoImage:
    """One image as its file is described."""

    id: int
    file_name: str
    height: int
    width: int


class CocoAnnotations:
    """Images with their objects.

    Args:
        dataset: The file's contents; see :func:`read_coco`.
        name: What to call it in a message.

    Attributes:
        images: In the file's order.
        objects: For every image id its annotations, as they are in the file.
        category_ids: The file's ids, sorted: label ``l`` of 1 to ``K`` means ``category_ids[l - 1]``.
        class_names: Names in the same order.
        unusable: How many objects are not trained on, by reason.

    Raises:
        ValueError: If ids are not unique, or an object is of no image.
    """

    def __init__(self, dataset: dict[str, Any], name: str) -> None:
        self.dataset, self.name = dataset, name
        for part in PARTS:
            _check_unique(dataset[part], part, name)
        self.images = [CocoImage(**{key: row[key] for key in FIELDS["images"]}) for row in dataset["images"]]
        categories = sorted(dataset["categories"], key=lambda row: row["id"])
        self.category_ids = [int(row["id"]) for row in categories]
        self.class_names = [str(row["name"]) for row in categories]
        self._labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self.objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self._usable: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self.unusable = Counter[str]()
        images = {image.id: image for image in self.images}
        for row in dataset["annotations"]:
            if row["image_id"] not in images:
                raise ValueError(f"{name}: annotation {row['id']} is of image {row['image_id']}, which is not listed")
            self._add(row, images[row["image_id"]])

    def _add(self, row: dict[str, Any], image: CocoImage) -> None:
        self.objects[image.id].append(row)
        reason = self.why_unusable(row, image)
        if reason is None:
            self._usable[image.id].append(row)
        else:
            self.unusable[reason] += 1

    def why_unusable(self, row: dict[str, Any], image: CocoImage) -> str | None:
        """Why an object is not trained on, as published; None if it is."""
        left, top, width, height = row["bbox"]
        overlap_x = min(left + width, image.width) - max(left, 0)
        overlap_y = min(top + height, image.height) - max(top, 0)
        reasons = {
            IGNORED: bool(row.get("ignore", False)),
            UNKNOWN: row["category_id"] not in self._labels,
            FLAT: not (area_of(row) > 0 and width >= 1 and height >= 1),  # so that NaN counts as flat
            OUTSIDE: not (overlap_x > 0 and overlap_y > 0),
            CROWD: bool(row.get("iscrowd", 0)),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def usable(self, image: CocoImage) -> list[dict[str, Any]]:
        """The objects of ``image`` to train on."""
        return self._usable.get(image.id, [])

    def truth(self) -> list[dict[str, Any]]:
        """What there is to find in evaluation: all objects of known category, what may be left out filled in."""
        filled = [
            {**row, "area": area_of(row), "iscrowd": int(row.get("iscrowd", 0))}
            for row in self.dataset["annotations"]
            if row["category_id"] in self._labels
        ]
        # COCO's tools take a polygon of two corners for a box
        return [{**row, "segmentation": polygons(row)} if not is_rle(row) else row for row in filled]

    def boxes(self, rows: list[dict[str, Any]], image: CocoImage) -> Tensor:
        """Left, top, right, bottom of objects inside of their image, float32 ``(n, 4)``."""
        corners = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        limits = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
        return corners.clamp(min=0).minimum(limits)

    def labels(self, rows: list[dict[str, Any]]) -> Tensor:
        """Classes of objects of known category from 1 on, int64 ``(n,)``."""
        return torch.tensor([self._labels[row["category_id"]] for row in rows], dtype=torch.int64)

    def masks(self, rows: list[dict[str, Any]], image: CocoImage) -> Tensor:
        """Masks of objects, uint8 ``(n, H, W)``."""
        masks = [decode_mask(row, image.height, image.width) for row in rows]
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, image.height, image.width).byte()


def read_coco(path: Path) -> dict[str, Any]:
    """The contents of a COCO annotation file, each field what it must be; optional ones that are null are left out.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no such file, or a field of a record is not what :mod:`.schema` wants.
    """
    dataset = load_coco(path)
    found = problems(dataset)
    first = next(found, None)
    if first is not None:
        others = sum(1 for _ in found)
        more = f"; {others} more such field{'s' * (others > 1)}" if others else ""
        raise ValueError(f"{path}: {first}{more}; `slab detect check-data` lists all, --fix OUTPUT mends what it can")
    return without_nulls_(dataset)


def load_coco(path: Path) -> Dataset:
    """The contents of a COCO annotation file as they are: lists of records, nothing else is checked.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no JSON, or holds no such lists.
    """
    if not path.exists():
        raise FileNotFoundError(f"no annotations at {str(path)!r}; give the COCO JSON file")
    try:
        dataset = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; is it a COCO annotation file?") from error
    return check_structure(dataset, str(path))


def area_of(row: dict[str, Any]) -> float:
    """Area of an object as the file says, its box's where it says nothing."""
    return row["area"] if row.get("area") is not None else row["bbox"][2] * row["bbox"][3]


def is_rle(row: dict[str, Any]) -> bool:
    """Whether an object's mask is run-length encoded."""
    return isinstance(row.get("segmentation"), dict)


def polygons(row: dict[str, Any]) -> list[list[float]]:
    """Outlines of an object that enclose something: of three corners at least."""
    return [outline for outline in row.get("segmentation") or [] if len(outline) >= 2 * FEWEST_CORNERS]


def has_mask(row: dict[str, Any]) -> bool:
    """Whether an object comes with a mask, as RLE or polygons."""
    return is_rle(row) or bool(polygons(row))


def mask_extent(row: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom of an object's mask, which it has; None if no pixel belongs to it."""
    if not is_rle(row):
        corners = np.concatenate([np.reshape(outline, (-1, 2)) for outline in polygons(row)])
        return (*corners.min(0).tolist(), *corners.max(0).tolist())
    code = row["segmentation"]
    runs = np.array(code["counts"] if isinstance(code["counts"], list) else runs_of(code["counts"]), dtype=np.int64)
    ends = np.cumsum(runs)
    filled = np.flatnonzero(runs[1::2]) * 2 + 1
    if not filled.size:
        return None
    height = code["size"][0]
    first, last = (ends - runs)[filled], ends[filled] - 1
    across = (first // height != last // height).any()  # a run from one column into the next
    top, bottom = (0, height) if across else ((first % height).min(), (last % height).max() + 1)
    return float(first[0] // height), float(top), float(last[-1] // height + 1), float(bottom)


def decode_mask(row: dict[str, Any], height: int, width: int) -> np.ndarray:
    """An object's mask from polygons or RLE, compressed or not: uint8 ``(H, W)`` of 0 and 1.

    Raises:
        ValueError: If an RLE is of another size than the image.
    """
    if is_rle(row):
        if list(row["segmentation"]["size"]) != [height, width]:
            sizes = f"{row['segmentation']['size']}, its image of {[height, width]}"
            raise ValueError(f"the mask of annotation {row['id']} is of {sizes}")
        return decode_runs(row["segmentation"])
    coco = require("pycocotools.mask", extra="detection")
    return decode_runs(coco.merge(coco.frPyObjects(polygons(row), height, width)))


def decode_runs(code: dict[str, Any]) -> np.ndarray:
    """A mask from RLE, compressed or not: uint8 ``(H, W)`` of 0 and 1."""
    coco = require("pycocotools.mask", extra="detection")
    if isinstance(code["counts"], list):
        code = coco.frPyObjects(code, *code["size"])
    with warnings.catch_warnings():
        # pycocotools 2.0.11 hands its memory over in the way of NumPy 1
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        return coco.decode(code)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask ``(H, W)`` as compressed RLE whose counts are text, as JSON needs them."""
    code = require("pycocotools.mask", extra="detection").encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def _check_unique(rows: list[dict[str, Any]], part: str, name: str) -> None:
    (first, count), *_ = Counter(row["id"] for row in rows).most_common(1) or [(None, 0)]
    if count > 1:
        raise ValueError(
            f"{name}: id {first} occurs {count} times among the {part}; `slab detect check-data` lists all"
        )
