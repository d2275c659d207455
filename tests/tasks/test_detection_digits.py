"""Digits on photographs: the same each time, apart from each other, in COCO's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slabformer.tasks.detection import digits
from slabformer.tasks.detection.annotations import CocoAnnotations, decode_mask
from slabformer.tasks.detection.config import DetectionAugment, DetectionData
from slabformer.tasks.detection.dataset import open_source
from slabformer.tasks.detection.digits import make_digits, write_digits
from slabformer.tasks.detection.loader import create_loader
from slabformer.tasks.engine.nonfinite import tensors_in

PLAIN = DetectionAugment(policy="none", size=128, max_size=128)


def test_images_follow_seed_and_split_alone() -> None:
    dataset, images = make_digits("train", num_images=6)
    again, same = make_digits("train", num_images=4)
    assert again["annotations"] == [row for row in dataset["annotations"] if row["image_id"] <= 4]
    for image, again in zip(images, same, strict=False):
        np.testing.assert_array_equal(image, again)
    for other in (make_digits("train", num_images=1, seed=1), make_digits("validation", num_images=1)):
        assert not np.array_equal(other[1][0], images[0])


def test_boxes_are_tight_and_digits_do_not_overlap() -> None:
    dataset, images = make_digits("train", num_images=40)
    annotations = CocoAnnotations(dataset, "digits")
    for image in annotations.images:
        masks = []
        for row in annotations.objects[image.id]:
            mask = decode_mask(row, 128, 128)
            left, top, width, height = row["bbox"]
            assert mask[top : top + height, left : left + width].sum() == mask.sum() == row["area"] > 0
            for edge in (mask[top, :], mask[top + height - 1, :], mask[:, left], mask[:, left + width - 1]):
                assert edge.any()
            masks.append(mask)
        assert 1 <= len(masks) <= 5
        assert np.max(np.sum(masks, axis=0)) == 1
    assert {image.shape for image in images} == {(128, 128, 3)}
    assert {row["category_id"] for row in dataset["annotations"]} == set(range(10))


def test_every_digit_can_be_told_from_what_is_behind_it() -> None:
    """The ink's colour is the one that was drawn: pixels of a mask are alike, those of the photograph are not."""
    dataset, images = make_digits("train", num_images=20)
    inside = [
        images[row["image_id"] - 1][decode_mask(row, 128, 128) > 0].std(axis=0).mean() for row in dataset["annotations"]
    ]
    assert np.median(inside) < 0.6 * np.median([image.std(axis=(0, 1)).mean() for image in images])


def test_written_files_are_the_embedded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "NUM_IMAGES", {"train": 6, "validation": 3})
    write_digits(tmp_path / "made" / "digits")
    for split in ("train", "validation"):
        embedded, written = (
            create_loader(DetectionData(path=path), PLAIN, split, batch_size=3, seed=0)
            for path in ("digits", str(tmp_path / "made" / "digits"))
        )
        assert len(embedded.dataset) in (6, 3)
        for left, right in zip(embedded, written, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors_in(left), tensors_in(right), strict=True))
    assert (tmp_path / "made" / "digits").stat().st_mode & 0o500 == 0o500


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(digits.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_digits(tmp_path / "out", num_train=1, num_validation=1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is there already"):
        write_digits(tmp_path)


def test_the_default_has_500_and_100_images(monkeypatch: pytest.MonkeyPatch) -> None:
    assert digits.NUM_IMAGES == {"train": 500, "validation": 100}
    source = open_source(DetectionData(), "validation")
    assert len(source.images) == 100
    assert source.annotations.class_names == [str(digit) for digit in range(10)]
