"""COCO files are read as they are meant, and refused in one line where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coco_files import coco_dataset, coco_object, two_objects_each
from slabformer.tasks.detection.annotations import (
    CROWD,
    FLAT,
    IGNORED,
    OUTSIDE,
    UNKNOWN,
    CocoAnnotations,
    decode_mask,
    encode_mask,
    has_mask,
    mask_extent,
    read_coco,
)

BOX = [2, 1, 3, 4]
MASK = np.zeros((6, 8), dtype=np.uint8)
MASK[1:5, 2:5] = 1
#: the same, column by column: lengths of runs of 0 and 1 in turn
RUNS = {"size": [6, 8], "counts": [13, 4, 2, 4, 2, 4, 19]}


def annotations_of(*objects: dict[str, Any], size: tuple[int, int] = (64, 48)) -> CocoAnnotations:
    return CocoAnnotations(coco_dataset([size], list(objects)), "test.json")


def test_labels_follow_sorted_category_ids() -> None:
    annotations = CocoAnnotations(two_objects_each([(64, 48)]), "test.json")
    assert annotations.category_ids == [3, 7, 90]
    assert annotations.class_names == ["cat", "dog", "owl"]
    assert annotations.labels(annotations.usable(annotations.images[0])).tolist() == [1, 3]


@pytest.mark.parametrize("segmentation", [None, RUNS, encode_mask(MASK)], ids=["polygon", "runs", "compressed"])
def test_every_kind_of_mask_is_read(segmentation: Any) -> None:
    row = coco_object(1, 1, BOX) if segmentation is None else coco_object(1, 1, BOX, segmentation=segmentation)
    assert has_mask(row)
    np.testing.assert_array_equal(decode_mask(row, 6, 8), MASK)


@pytest.mark.parametrize("segmentation", [None, RUNS, encode_mask(MASK)], ids=["polygon", "runs", "compressed"])
def test_the_extent_of_every_kind_of_mask_is_its_boxs(segmentation: Any) -> None:
    row = coco_object(1, 1, BOX) if segmentation is None else coco_object(1, 1, BOX, segmentation=segmentation)
    assert mask_extent(row) == (2, 1, 5, 5)


def test_a_run_into_the_next_column_is_as_high_as_the_mask() -> None:
    row = coco_object(1, 1, BOX, segmentation={"size": [6, 8], "counts": [16, 4, 28]})
    assert mask_extent(row) == (2, 0, 4, 6)


def test_parts_of_an_object_are_one_mask() -> None:
    first, second = (coco_object(1, 1, box)["segmentation"][0] for box in ([0, 0, 2, 2], [4, 3, 2, 2]))
    row = coco_object(1, 1, BOX, segmentation=[first, second, [1, 1, 2, 2]])
    assert int(decode_mask(row, 6, 8).sum()) == 8


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"annotation 5 is of \[6, 8\], its image of \[8, 6\]"):
        decode_mask(coco_object(5, 1, BOX, segmentation=RUNS), 8, 6)


@pytest.mark.parametrize("segmentation", [[], None, [[1, 1, 5, 5]]], ids=["empty", "none", "two-corners"])
def test_what_encloses_nothing_is_no_mask(segmentation: Any) -> None:
    assert not has_mask(coco_object(1, 1, BOX, segmentation=segmentation))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"bbox": [60, 40, 1, 1], "area": 1}, None),
        ({"ignore": True}, IGNORED),
        ({"category_id": 4}, UNKNOWN),
        ({"area": 0}, FLAT),
        ({"bbox": [5, 5, 0.9, 9]}, FLAT),
        ({"bbox": [5, 5, 9, float("nan")]}, FLAT),
        ({"bbox": [64, 5, 9, 9]}, OUTSIDE),
        ({"bbox": [5, -9, 9, 9]}, OUTSIDE),
        ({"iscrowd": 1}, CROWD),
    ],
    ids=["good", "one-pixel", "ignore", "unknown", "no-area", "thin", "nan", "right", "above", "crowd"],
)
def test_objects_are_left_out_for_a_reason(fields: dict[str, Any], reason: str | None) -> None:
    annotations = annotations_of({**coco_object(1, 1, [5, 5, 9, 9]), **fields})
    (image,) = annotations.images
    assert annotations.why_unusable(annotations.objects[1][0], image) == reason
    assert len(annotations.usable(image)) == (reason is None)
    assert dict(annotations.unusable) == ({} if reason is None else {reason: 1})


def test_boxes_are_corners_cut_at_the_image() -> None:
    annotations = annotations_of(coco_object(1, 1, [-3, 40, 10, 20]), coco_object(2, 1, [1.5, 2, 3, 4]))
    image = annotations.images[0]
    expected = torch.tensor([[0, 40, 7, 48], [1.5, 2, 4.5, 6]])
    assert torch.equal(annotations.boxes(annotations.usable(image), image), expected)


def test_an_image_without_objects_has_empty_targets() -> None:
    annotations = annotations_of()
    image = annotations.images[0]
    assert annotations.boxes([], image).shape == (0, 4)
    assert annotations.labels([]).shape == (0,)
    assert annotations.masks([], image).shape == (0, 48, 64)


def test_what_a_file_leaves_out_is_filled_in_for_evaluation() -> None:
    bare = {key: coco_object(1, 1, [5, 5, 9, 9])[key] for key in ("id", "image_id", "category_id", "bbox")}
    odd = coco_object(2, 1, [5, 5, 9, 9], segmentation=[[1, 1, 5, 5]])
    first, second = annotations_of(bare, odd, coco_object(3, 1, [5, 5, 9, 9], category=4)).truth()
    assert (first["area"], first["iscrowd"], first["segmentation"]) == (81, 0, [])
    assert second["segmentation"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "no list of categories"),
        (lambda d: d["images"][0].pop("height"), r"images\[0\] \(id 1\): height is missing"),
        (lambda d: d["annotations"][1].pop("bbox"), r"annotations\[1\] \(id 3\): bbox is missing"),
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2, 3]),
            r"annotations\[1\] \(id 3\): bbox must be four numbers from -131072 to 131072, got \[1, 2, 3\]",
        ),
    ],
    ids=["part", "image", "object", "bbox"],
)
def test_files_that_are_not_coco_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    dataset = json.loads(json.dumps(two_objects_each([(64, 48)])))
    change(dataset)
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(dataset))
    with pytest.raises(ValueError, match=message):
        read_coco(path)


def test_a_missing_file_and_one_that_is_not_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no annotations at"):
        read_coco(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="is not JSON"):
        read_coco(tmp_path / "bad.json")


def test_ids_must_be_unique_and_known() -> None:
    with pytest.raises(ValueError, match="id 1 occurs 2 times among the annotations"):
        annotations_of(coco_object(1, 1, BOX), coco_object(1, 1, BOX))
    with pytest.raises(ValueError, match="annotation 1 is of image 8, which is not listed"):
        annotations_of(coco_object(1, 8, BOX))
