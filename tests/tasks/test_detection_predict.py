"""Predictions are where things are on the picture as it is, whatever it was resized to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detectors import SMALL_SWIN, small_config, small_detector, trained_looking
from image_folders import picture
from slabformer.tasks.detection.annotations import decode_runs
from slabformer.tasks.detection.drawing import class_colour
from slabformer.tasks.detection.predict import draw, on_device, picture_paths, predict
from slabformer.tasks.detection.saved import DetectorInfo

INFO = DetectorInfo(
    backbone="slab_swin_tiny",
    backbone_args=SMALL_SWIN,
    detector=small_config(),
    class_names=["cat", "dog", "owl"],
    category_ids=[3, 7, 90],
    size=96,
    max_size=128,
)


def left_half(image: Tensor) -> dict[str, Tensor]:
    """Sees an owl on the left half of everything, and a doubtful cat on all of it."""
    height, width = image.shape[-2:]
    return {
        "boxes": torch.tensor([[0.0, 0.0, width / 2, height], [0.0, 0.0, width, height]]),
        "labels": torch.tensor([3, 1]),
        "scores": torch.tensor([0.9, 0.2]),
        "masks": torch.ones(2, 1, 28, 28),
    }


def saved_picture(path: Path, size: tuple[int, int] = (60, 40), **options: Any) -> Path:
    picture(0, size).save(path, **options)
    return path


def test_boxes_and_masks_are_in_pixels_of_the_picture(tmp_path: Path) -> None:
    (prediction,) = predict(left_half, INFO, [saved_picture(tmp_path / "a.png")])
    (owl,) = prediction.objects
    assert (owl.label, owl.name, owl.score) == (3, "owl", pytest.approx(0.9))
    assert owl.box == pytest.approx([0, 0, 30, 40])
    assert prediction.size == (40, 60)
    mask = decode_runs(owl.mask)
    expected = np.zeros((40, 60), dtype=np.uint8)
    expected[:, :30] = 1
    np.testing.assert_array_equal(mask, expected)


def test_images_are_resized_as_for_evaluation(tmp_path: Path) -> None:
    seen: list[torch.Size] = []

    def note(image: Tensor) -> dict[str, Tensor]:
        seen.append(image.shape)
        assert 0 <= image.min() < image.max() <= 1
        return left_half(image)

    list(predict(note, INFO, [saved_picture(tmp_path / "a.png"), saved_picture(tmp_path / "b.png", (40, 40))]))
    assert seen == [(3, 85, 128), (3, 96, 96)]


@pytest.mark.parametrize("score", [0.1, 0.3, 0.95])
def test_only_objects_of_enough_score_are_kept(score: float, tmp_path: Path) -> None:
    (prediction,) = predict(left_half, INFO, [saved_picture(tmp_path / "a.png")], score=score)
    assert [found.name for found in prediction.objects] == {0.1: ["owl", "cat"], 0.3: ["owl"], 0.95: []}[score]
    assert draw(prediction).shape == (3, 40, 60)


def test_a_detector_of_boxes_gives_no_masks(tmp_path: Path) -> None:
    def boxes_alone(image: Tensor) -> dict[str, Tensor]:
        return {name: value for name, value in left_half(image).items() if name != "masks"}

    (prediction,) = predict(boxes_alone, INFO, [saved_picture(tmp_path / "a.png")])
    assert prediction.objects[0].mask is None
    assert draw(prediction)[:, 20, 0].tolist() == list(class_colour(3))


def test_the_drawing_shows_the_mask_in_its_classs_colour(tmp_path: Path) -> None:
    path = saved_picture(tmp_path / "a.png")
    (prediction,) = predict(left_half, INFO, [path])
    before = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
    drawn = draw(prediction)
    assert torch.equal(drawn[:, 20:, 32:], before[:, 20:, 32:])  # below the label
    assert (drawn[:, 20:38, 4:26] != before[:, 20:38, 4:26]).any(dim=0).float().mean() > 0.95


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_pictures_of_any_kind_are_read(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if mode == "I;16":
        Image.fromarray(np.full((40, 60), 30000, dtype=np.uint16)).save(path)
    else:
        picture(0, (60, 40)).convert(mode).save(path)
    (prediction,) = predict(left_half, INFO, [path])
    assert prediction.size == (40, 60)
    assert draw(prediction).shape == (3, 40, 60)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (prediction,) = predict(left_half, INFO, [saved_picture(tmp_path / "a.jpg", exif=exif)])
    assert prediction.size == (60, 40)
    assert prediction.objects[0].box == pytest.approx([0, 0, 20, 60])


def test_a_damaged_picture_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG nothing more")
    first, second = predict(left_half, INFO, [bad, saved_picture(tmp_path / "a.png")])
    assert "cannot identify image file" in first.error
    assert first.objects == []
    assert second.error is None


def test_a_real_detector_finds_what_it_finds_in_evaluation(tmp_path: Path) -> None:
    detector = trained_looking(small_detector())
    detect = on_device(detector, torch.device("cpu"))
    (prediction,) = predict(detect, INFO, [saved_picture(tmp_path / "a.png", (96, 96))], score=0.0)
    image = torch.from_numpy(np.asarray(Image.open(tmp_path / "a.png")).copy()).permute(2, 0, 1) / 255
    with torch.no_grad():
        (expected,) = detector([image])
    assert len(prediction.objects) == len(expected["boxes"]) > 0
    boxes = torch.tensor([found.box for found in prediction.objects])
    torch.testing.assert_close(boxes, expected["boxes"])


def test_folders_and_patterns_are_expanded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files = [saved_picture(tmp_path / name) for name in ("a.png", "b.png", "c.jpg", "in/d.png", "e[1].png")]
    assert picture_paths([str(tmp_path / "*.jpg"), str(files[0])]) == [files[2], files[0]]
    assert picture_paths([str(tmp_path / "**" / "d.png")]) == [files[3]]
    assert picture_paths([str(files[4])]) == [files[4]]
    assert picture_paths([str(tmp_path)]) == sorted(files)
    with pytest.raises(ValueError, match=r"no file matches .*gif"):
        picture_paths([str(tmp_path / "*.gif")])


def test_a_score_is_between_0_and_1() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 30"):
        list(predict(left_half, replace(INFO), [], score=30))
