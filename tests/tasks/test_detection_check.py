"""What check-data finds is what training refuses or leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coco_files import CATEGORIES, coco_dataset, coco_object, write_root
from image_folders import picture
from slabformer.tasks.detection import digits
from slabformer.tasks.detection.check import Finding, SplitReport, check_data, size_of
from slabformer.tasks.detection.config import DetectionData
from slabformer.tasks.detection.dataset import open_source


def reports_of(root: Path, **options: Any) -> list[SplitReport]:
    decode = options.pop("decode", False)
    return check_data(DetectionData(path=str(root), **options), decode=decode)


def change_training(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "annotations" / "instances_train2017.json"
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset))


def found(report: SplitReport, words: str) -> Finding:
    (finding,) = [finding for finding in report.findings if words in finding.what]
    return finding


def test_good_data_gives_counts_and_nothing_else(tmp_path: Path) -> None:
    train, validation = reports_of(write_root(tmp_path), decode=True)
    assert (train.num_images, train.num_objects, validation.num_images) == (6, 12, 3)
    assert [(row.name, row.num_objects, row.num_images) for row in train.classes] == [
        ("cat", 6, 6),
        ("dog", 0, 0),
        ("owl", 6, 6),
    ]
    assert train.findings == []
    assert [finding.what for finding in validation.findings] == ["classes without an object to train on"]
    assert not train.stops
    assert not validation.stops


def test_the_embedded_digits_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "NUM_IMAGES", {"train": 30, "validation": 10})
    assert all(report.findings == [] for report in check_data(DetectionData()))


@pytest.mark.parametrize(
    ("change", "words", "examples"),
    [
        (lambda d: d["annotations"].append(coco_object(2, 1, [1, 1, 5, 5])), "ids used twice among the anno", ["2"]),
        (lambda d: d["images"].append(d["images"][0]), "ids used twice among the images", ["1"]),
        (lambda d: d["annotations"][0].update(image_id=77), "images that are not listed", ["2"]),
        (lambda d: d["annotations"][0].update(segmentation=[]), "without masks", ["2"]),
        (lambda d: d.update(annotations=[]), "no image is left to train on", None),
        (lambda d: d.update(annotations=[], images=[]), "there are no images", None),
        (lambda d: d.update(categories=CATEGORIES[:2]), "not those of the training annotations", ["7: dog"]),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [9, 9], "counts": [81]}),
            "masks of another size",
            ["2"],
        ),
    ],
    ids=["object-id", "image-id", "orphan", "mask", "bare", "empty", "categories", "mask-size"],
)
def test_what_stops_training_is_found(change: Any, words: str, examples: list[str] | None, tmp_path: Path) -> None:
    change_training(write_root(tmp_path), change)
    reports = reports_of(tmp_path)
    (finding,) = [finding for report in reports for finding in report.findings if words in finding.what]
    assert finding.stops
    assert examples is None or finding.examples == examples


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"category_id": 55}, "of unknown category: not trained on"),
        ({"ignore": 1}, "marked `ignore`: not trained on; evaluation still counts them"),
        ({"bbox": [4, 4, 0, 9]}, "without area: not trained on"),
        ({"bbox": [400, 4, 9, 9]}, "outside: not trained on"),
        ({"iscrowd": 1}, "crowds: not trained on"),
        ({"bbox": [60, 4, 9, 9]}, "reach beyond their image: cut"),
    ],
    ids=["category", "ignore", "area", "outside", "crowd", "beyond"],
)
def test_what_is_left_out_is_found_and_stops_nothing(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    change_training(write_root(tmp_path), lambda d: d["annotations"][0].update(fields))
    report = reports_of(tmp_path)[0]
    finding = found(report, words)
    assert (finding.count, finding.examples) == (1, ["2"])
    assert not report.stops
    open_source(DetectionData(path=str(tmp_path)), "train")


def test_missing_and_misfitting_images_are_found(tmp_path: Path) -> None:
    folder = write_root(tmp_path) / "train2017"
    (folder / "2.png").unlink()
    picture(0, (32, 32)).save(folder / "3.png")
    report = reports_of(tmp_path)[0]
    assert found(report, "images that are not in").examples == ["2.png"]
    assert found(report, "another size").examples == ["3.png (32x32, listed as 64x48)"]
    assert report.stops
    assert not reports_of(tmp_path, max_unreadable=2)[0].stops


def test_a_truncated_image_is_found_by_decoding(tmp_path: Path) -> None:
    path = write_root(tmp_path) / "train2017" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    assert reports_of(tmp_path)[0].findings == []
    assert found(reports_of(tmp_path, decode=True)[0], "cannot be read").examples == ["2.png"]


def test_boxes_alone_need_no_masks(tmp_path: Path) -> None:
    change_training(write_root(tmp_path), lambda d: d["annotations"][0].pop("segmentation"))
    assert not reports_of(tmp_path, masks=False)[0].stops


@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 48)), (6, (48, 64))])
def test_the_upright_size_is_known_without_decoding(orientation: int, size: tuple[int, int], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(0, (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert size_of(tmp_path / "a.jpg") == size
    assert size_of(tmp_path / "a.jpg", upright=False) == (64, 48)


def test_images_without_objects_and_listed_twice_are_told(tmp_path: Path) -> None:
    write_root(tmp_path)
    dataset = coco_dataset([(64, 48), (64, 48)], [coco_object(1, 1, [4, 6, 20, 10])])
    dataset["images"][1]["file_name"] = "1.png"
    change_training(tmp_path, lambda d: d.update(dataset))
    report = reports_of(tmp_path)[0]
    assert found(report, "files listed twice").examples == ["1.png"]
    assert found(report, "images without a usable object").count == 1
    assert not report.stops


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"segmentation": [[40, 30, 60, 30, 60, 45]]}, "masks without a pixel in their box"),
        ({"segmentation": {"size": [48, 64], "counts": [48 * 64]}}, "masks without a pixel in their box"),
        ({"segmentation": {"size": [48, 64], "counts": [48 * 40, 9, 48 * 24 - 9]}}, "masks without a pixel"),
        ({"area": 20 * 10 * 2}, "areas larger than their box"),
        (coco_object(3, 1, [10, 18, 12, 14], category=90), "objects listed twice"),
    ],
    ids=["outline", "empty", "runs", "area", "twice"],
)
def test_what_contradicts_itself_is_told_and_trains(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    def change(dataset: dict[str, Any]) -> None:
        dataset["annotations"][0].update(fields)
        dataset["annotations"][1]["id"] = 99

    change_training(write_root(tmp_path), change)
    report = reports_of(tmp_path)[0]
    assert found(report, words).count == 1
    assert [finding.what for finding in report.findings] == [found(report, words).what]
    assert not report.stops
