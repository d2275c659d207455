"""Small COCO data sets on disk, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from image_folders import picture

#: ids in no order and with gaps, as people have them
CATEGORIES = [{"id": 90, "name": "owl"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def coco_object(number: int, image: int, bbox: list[float], category: int = 3, **fields: Any) -> dict[str, Any]:
    """An annotation whose mask is its box."""
    left, top, width, height = bbox
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    row = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": width * height}
    return {**row, "iscrowd": 0, "segmentation": [corners], **fields}


def coco_dataset(sizes: list[tuple[int, int]], objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Contents of an annotation file: image ``i``, counted from 1, is of ``sizes[i - 1]``, width first."""
    images = [
        {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        for number, (width, height) in enumerate(sizes, start=1)
    ]
    return {"images": images, "annotations": objects, "categories": CATEGORIES}


def write_split(root: Path, split: str, dataset: dict[str, Any]) -> None:
    """Write annotations and a picture for every image they list; ``split`` is "train" or "val"."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(dataset))
    (root / f"{split}2017").mkdir()
    for row in dataset["images"]:
        picture(row["id"], (row["width"], row["height"])).save(root / f"{split}2017" / row["file_name"])


def two_objects_each(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """A cat and an owl on every image."""
    objects = []
    for image in range(1, len(sizes) + 1):
        objects.append(coco_object(2 * image, image, [4, 6, 20, 10], category=3))
        objects.append(coco_object(2 * image + 1, image, [10, 18, 12, 14], category=90))
    return coco_dataset(sizes, objects)


def write_root(root: Path, num_train: int = 6, num_validation: int = 3) -> Path:
    """A data set of landscape and portrait images, two objects each."""
    sizes = [(64, 48), (48, 64)]
    write_split(root, "train", two_objects_each([sizes[i % 2] for i in range(num_train)]))
    write_split(root, "val", two_objects_each([sizes[i % 2] for i in range(num_validation)]))
    return root
