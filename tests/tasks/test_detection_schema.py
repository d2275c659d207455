"""Every field of every COCO record is what the schema wants, or is named, counted and mended."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coco_files import coco_dataset, coco_object, two_objects_each, write_root
from image_folders import picture
from slabformer.tasks.detection.annotations import CocoAnnotations, decode_runs, encode_mask, read_coco
from slabformer.tasks.detection.check import check_data, mend_data
from slabformer.tasks.detection.config import DetectionData
from slabformer.tasks.detection.dataset import open_source
from slabformer.tasks.detection.metrics import CocoMetrics
from slabformer.tasks.detection.schema import FIELDS, mend, problems, runs_of, why_no_rle

BOX = [4, 6, 20, 10]
GOOD = coco_object(2, 1, BOX)
RLE = {"size": [48, 64], "counts": [100, 72, 2900]}
DROP = object()


def dataset_with(part: str, field: str, value: Any) -> dict[str, Any]:
    """A good data set but for one field of its first record of ``part``; :data:`DROP` leaves the field out."""
    dataset = copy.deepcopy(two_objects_each([(64, 48), (64, 48)]))
    row = dataset[part][0]
    row.pop(field, None)
    if value is not DROP:
        row[field] = value
    return dataset


def spoilt(code: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**code, **fields}


#: part, field, a value that it must not hold, what mending makes of it (DROP: the record goes)
BAD: list[tuple[str, str, Any, Any]] = [
    ("images", "id", "1", 1),
    ("images", "id", 1.0, 1),
    ("images", "id", 1.5, DROP),
    ("images", "id", True, DROP),
    ("images", "id", 2**63, DROP),
    ("images", "file_name", None, DROP),
    ("images", "file_name", "", DROP),
    ("images", "file_name", 7, DROP),
    ("images", "file_name", DROP, DROP),
    ("images", "height", "48", 48),
    ("images", "height", None, DROP),
    ("images", "height", 0, DROP),
    ("images", "height", -48, DROP),
    ("images", "width", 64.0, 64),
    ("images", "width", 10**9, DROP),
    ("images", "width", [64], DROP),
    ("annotations", "id", "2", 2),
    ("annotations", "id", None, 6),
    ("annotations", "id", DROP, 6),
    ("annotations", "image_id", "1", 1),
    ("annotations", "image_id", None, DROP),
    ("annotations", "category_id", "3", 3),
    ("annotations", "category_id", [3], DROP),
    ("annotations", "bbox", [4, 6, 20], DROP),
    ("annotations", "bbox", [4, 6, "20", "10"], BOX),
    ("annotations", "bbox", "4 6 20 10", DROP),
    ("annotations", "bbox", [4, 6, 20, None], DROP),
    ("annotations", "bbox", [4, 6, 20, float("nan")], DROP),
    ("annotations", "bbox", [4, 6, 20, float("inf")], DROP),
    ("annotations", "bbox", [4, 6, 20, 1e300], DROP),
    ("annotations", "bbox", [4, 6, 20, 10**400], DROP),
    ("annotations", "bbox", None, DROP),
    ("annotations", "area", "200", 200),
    ("annotations", "area", "big", None),
    ("annotations", "area", -1, None),
    ("annotations", "area", [200], None),
    ("annotations", "area", float("nan"), None),
    ("annotations", "area", 10**400, None),
    ("annotations", "iscrowd", "0", 0),
    ("annotations", "iscrowd", "false", 0),
    ("annotations", "iscrowd", 2, DROP),
    ("annotations", "iscrowd", [], DROP),
    ("annotations", "ignore", "1", 1),
    ("annotations", "ignore", "maybe", DROP),
    ("annotations", "segmentation", GOOD["segmentation"][0], GOOD["segmentation"]),
    ("annotations", "segmentation", [[4, 6, 24, 6, 24]], DROP),
    ("annotations", "segmentation", [[4, 6, 24, 6, 24], GOOD["segmentation"][0]], GOOD["segmentation"]),
    ("annotations", "segmentation", [["4", "6", "24", "6", "24", "16"]], [[4, 6, 24, 6, 24, 16]]),
    ("annotations", "segmentation", [["a", "b", "c", "d", "e", "f"]], DROP),
    ("annotations", "segmentation", [[4, 6, 24, 6, None, 16]], DROP),
    ("annotations", "segmentation", [None], DROP),
    ("annotations", "segmentation", [[4, 6, 24, 6, float("inf"), 16]], DROP),
    ("annotations", "segmentation", [[4, 6, 24, 6, 1e8, 16]], DROP),  # pycocotools ends in a segmentation fault
    ("annotations", "segmentation", [[4, 6, 24, 6, 1e300, 16], GOOD["segmentation"][0]], GOOD["segmentation"]),
    ("annotations", "segmentation", "RLE", DROP),
    ("annotations", "segmentation", 7, DROP),
    ("annotations", "segmentation", spoilt(RLE, counts=[100, 72]), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts=[100, 72, 2901]), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts=[100, -72, 3044]), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts=[100, "72", 2900]), RLE),
    ("annotations", "segmentation", spoilt(RLE, counts=[100.5, 71.5, 2900]), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts="garbage!"), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts="\u00e9"), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts=None), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts=7), DROP),
    ("annotations", "segmentation", spoilt(RLE, counts=[10**30]), DROP),
    ("annotations", "segmentation", {"counts": RLE["counts"]}, DROP),
    ("annotations", "segmentation", spoilt(RLE, size=[48]), DROP),
    ("annotations", "segmentation", spoilt(RLE, size=["48", "64"]), RLE),
    ("annotations", "segmentation", spoilt(RLE, size=[10**6, 10**6]), DROP),
    ("annotations", "segmentation", {}, DROP),
    ("categories", "id", "90", 90),
    ("categories", "id", None, DROP),
    ("categories", "name", None, DROP),
    ("categories", "name", "", DROP),
    ("categories", "name", 7, "7"),
]
IDS = [f"{part}-{field}-{index}" for index, (part, field, *_) in enumerate(BAD)]


@pytest.mark.parametrize(("part", "field", "value", "meant"), BAD, ids=IDS)
def test_a_field_that_is_not_what_it_must_be_is_named_and_mended(
    part: str, field: str, value: Any, meant: Any, tmp_path: Path
) -> None:
    dataset = dataset_with(part, field, value)
    (problem,) = problems(dataset)
    assert (problem.part, problem.index, problem.field) == (part, 0, field)
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(dataset))
    with pytest.raises(ValueError, match=rf"objects.json: {part}\[0\].*: {field} .*check-data"):
        read_coco(path)
    mended = mend(dataset).dataset
    assert list(problems(mended)) == []
    kept = len(mended[part]) == len(dataset[part])
    assert kept == (meant is not DROP)
    if kept:
        assert mended[part][0].get(field) == meant
    CocoAnnotations(mended, "mended").truth()
    assert dataset[part][0].get(field, DROP) is value  # left as it was


def test_every_field_that_is_read_is_in_the_table() -> None:
    for part, rules in FIELDS.items():
        tried = {field for of, field, *_ in BAD if of == part}
        assert tried == set(rules)


@pytest.mark.parametrize("field", ["area", "iscrowd", "ignore", "segmentation"])
def test_null_is_left_out_where_a_field_may_be_and_said(field: str, tmp_path: Path) -> None:
    write_root(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    dataset = json.loads(path.read_text())
    dataset["annotations"][0][field] = None
    path.write_text(json.dumps(dataset))
    assert field not in read_coco(path)["annotations"][0]
    report = check_data(DetectionData(path=str(tmp_path), masks=False))[0]
    assert f"annotations: {field} is null, as if left out" in [finding.what for finding in report.findings]
    assert not report.stops
    assert open_source(DetectionData(path=str(tmp_path), masks=False), "train").annotations.truth()


@pytest.mark.parametrize("seed", range(5))
def test_compressed_counts_are_read_as_coco_reads_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(1, 200, 2)
    mask = (generator.random((height, width)) < generator.random()).astype(np.uint8)
    if seed == 0:
        mask[:] = 0
    code = encode_mask(mask)
    changes = np.flatnonzero(np.diff(mask.T.flatten(), prepend=0, append=2))
    expected = np.diff(changes, prepend=0)
    runs = runs_of(code["counts"])
    assert runs.sum() == height * width
    np.testing.assert_array_equal(runs[runs > 0], expected[expected > 0])
    assert why_no_rle(code) == ""
    np.testing.assert_array_equal(decode_runs(code), mask)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_counts_cut_short_are_no_mask(cut: int) -> None:
    code = encode_mask((np.random.default_rng(0).random((40, 50)) < 0.5).astype(np.uint8))
    assert why_no_rle({**code, "counts": code["counts"][:-cut]})


def test_perfect_detections_score_100_whatever_the_ids(tmp_path: Path) -> None:
    dataset = two_objects_each([(64, 48)] * 3)
    for number, row in enumerate(dataset["annotations"]):
        row["id"] = number  # from 0
    annotations = CocoAnnotations(dataset, "test")
    for backend in ("pycocotools", "faster-coco-eval"):
        metrics = CocoMetrics(annotations, masks=False, backend=backend)
        for image in annotations.images:
            rows = annotations.usable(image)
            boxes, labels = annotations.boxes(rows, image), annotations.labels(rows)
            metrics.add(image.id, boxes, labels, torch.full((len(rows),), 0.9))
        assert metrics.compute().box["AP"] == pytest.approx(100)


def test_ids_that_are_names_become_numbers_and_keep_their_objects() -> None:
    dataset = two_objects_each([(64, 48), (64, 48)])
    for row in dataset["images"]:
        row["id"] = f"image-{row['id']}"
    for row in dataset["annotations"]:
        row["image_id"] = f"image-{row['image_id']}"
    mended = mend(dataset)
    assert not mended.removed
    annotations = CocoAnnotations(mended.dataset, "mended")
    assert [len(annotations.usable(image)) for image in annotations.images] == [2, 2]


def test_ids_used_twice_are_numbered_anew_and_copies_go() -> None:
    dataset = two_objects_each([(64, 48)])
    dataset["annotations"].append(coco_object(2, 1, [1, 1, 9, 9]))
    dataset["images"].append(dict(dataset["images"][0]))
    mended = mend(dataset)
    assert [row["id"] for row in mended.dataset["annotations"]] == [2, 3, 4]
    assert mended.removed == {"images listed twice": 1}
    dataset["images"].append({**dataset["images"][0], "file_name": "other.png"})
    with pytest.raises(ValueError, match="id 1 belongs to 2 different images"):
        mend(dataset)


def test_objects_of_no_image_and_masks_of_another_size_go() -> None:
    dataset = coco_dataset([(64, 48)], [coco_object(1, 9, BOX), coco_object(2, 1, BOX, segmentation=RLE)])
    dataset["annotations"].append(coco_object(3, 1, BOX, segmentation={"size": [64, 48], "counts": [3072]}))
    mended = mend(dataset)
    assert [row["id"] for row in mended.dataset["annotations"]] == [2]
    assert sum(mended.removed.values()) == 2


def test_a_first_problem_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    dataset = two_objects_each([(64, 48), (64, 48)])
    for row in dataset["annotations"][:3]:
        row["area"] = "big"
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(dataset))
    expected = r"annotations\[0\] \(id 2\): area must be a number from 0 on, got 'big'; 2 more such fields"
    with pytest.raises(ValueError, match=expected):
        read_coco(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe{}", "is no text in UTF-8"),
        (b'{"images": [7], "annotations": [], "categories": []}', r"images\[0\] is no record but 7"),
        (b"[]", "no list of images"),
        (b'{"images": {}, "annotations": [], "categories": []}', "no list of images"),
    ],
    ids=["deep", "utf-16", "number", "list", "mapping"],
)
def test_what_is_no_coco_file_is_told_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_coco(path)
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(two_objects_each([(64, 48)])), encoding="utf-8-sig")
    assert len(read_coco(path)["images"]) == 1


def test_check_data_counts_each_kind_and_fix_writes_files_that_train(tmp_path: Path) -> None:
    root = write_root(tmp_path / "data")
    path = root / "annotations" / "instances_train2017.json"
    dataset = json.loads(path.read_text())
    for row in dataset["annotations"][:4]:
        row["iscrowd"] = "0"
    dataset["annotations"][5]["bbox"] = [1, 2]
    path.write_text(json.dumps(dataset))
    before = path.read_bytes()
    data = DetectionData(path=str(root))
    report = check_data(data)[0]
    assert {(f.what, f.count) for f in report.findings if f.stops} == {
        ("annotations: iscrowd must be 0 or 1", 4),
        ("annotations: bbox must be four numbers from -131072 to 131072", 1),
    }
    assert report.findings[0].examples[0] in (
        "annotations[0] (id 2): '0'",
        "annotations[5] (id 7): [1, 2]",
    )
    train, validation = mend_data(data, tmp_path / "mended")
    assert train.changed == {"annotations: iscrowd must be 0 or 1": 4}
    assert train.removed == {"annotations: bbox must be four numbers from -131072 to 131072": 1}
    assert (validation.changed, validation.removed) == ({}, {})
    assert path.read_bytes() == before
    mended = DetectionData(path=str(root), train_annotations=str(train.path), val_annotations=str(validation.path))
    assert not any(each.stops for each in check_data(mended))
    assert open_source(mended, "train").images


def test_fix_never_writes_over_the_annotations(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    with pytest.raises(ValueError, match=r"stays as it is; give another folder"):
        mend_data(DetectionData(path=str(root)), root / "annotations")
    with pytest.raises(ValueError, match="embedded digits need no mending"):
        mend_data(DetectionData(), tmp_path / "out")


def test_evaluation_says_what_it_counts_though_training_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_root(tmp_path)
    path = root / "annotations" / "instances_val2017.json"
    dataset = json.loads(path.read_text())
    dataset["annotations"][0]["ignore"] = 1
    dataset["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(dataset))
    with caplog.at_level(logging.INFO):
        open_source(DetectionData(path=str(root)), "validation")
    (said,) = [message for message in caplog.messages if "evaluation counts them" in message]
    assert said.endswith("evaluation counts them: 1 marked `ignore`")


@pytest.mark.parametrize(("orientation", "pixels"), [("exif", (48, 64)), ("stored", (64, 48))])
def test_annotations_of_stored_pixels_have_a_switch(orientation: Any, pixels: tuple[int, int], tmp_path: Path) -> None:
    root = write_root(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (64, 48)).save(root / "train2017" / "1.png", exif=exif)
    path = root / "annotations" / "instances_train2017.json"
    dataset = json.loads(path.read_text())
    dataset["images"][0].update(width=pixels[0], height=pixels[1])
    path.write_text(json.dumps(dataset))
    data = DetectionData(path=str(root), orientation=orientation)
    assert not check_data(data)[0].stops
    source = open_source(data, "train")
    assert source.read(source.images[0]).size == pixels
    other = DetectionData(path=str(root), orientation="stored" if orientation == "exif" else "exif")
    source = open_source(other, "train")
    with pytest.raises(ValueError, match=f"try data.orientation={orientation}"):
        source.read(source.images[0])
