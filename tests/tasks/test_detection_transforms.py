"""The published pipelines, held to known values and to plain references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slabformer.tasks.detection.transforms import (
    DetectionAugment,
    RandomRangeCrop,
    ResizeKeepRatio,
    as_example,
    drop_empty,
    eval_transform,
    keep_ratio,
    train_transform,
)

SMALL = DetectionAugment(sizes=(24, 30), crop_sizes=(20, 26), crop_range=(12, 18), size=28, max_size=48)


def example(height: int, width: int, boxes: list[list[float]]) -> tuple:
    """A random image whose masks are its boxes."""
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    return as_example(image, torch.tensor(boxes), torch.arange(1, len(boxes) + 1), masks)


def bilinear_reference(image: Tensor, height: int, width: int) -> Tensor:
    """Every pixel from its four neighbours, in a loop."""
    old_height, old_width = image.shape[-2:]
    made = torch.empty(3, height, width)
    for y in range(height):
        for x in range(width):
            row = max((y + 0.5) * old_height / height - 0.5, 0.0)
            column = max((x + 0.5) * old_width / width - 0.5, 0.0)
            top, left = min(int(row), old_height - 1), min(int(column), old_width - 1)
            bottom, right = min(top + 1, old_height - 1), min(left + 1, old_width - 1)
            down, across = row - top, column - left
            upper = image[:, top, left] * (1 - across) + image[:, top, right] * across
            lower = image[:, bottom, left] * (1 - across) + image[:, bottom, right] * across
            made[:, y, x] = upper * (1 - down) + lower * down
    return made


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((480, 640), 800, (800, 1067)),  # torchvision rounds down, to 1066
        ((427, 640), 800, (800, 1199)),
        ((333, 1000), 800, (444, 1333)),
        ((1000, 333), 800, (1333, 444)),
        ((800, 1333), 800, (800, 1333)),
        ((500, 375), 480, (640, 480)),
    ],
)
def test_sizes_are_rounded_to_the_nearest_pixel(size: tuple[int, int], short: int, expected: tuple[int, int]) -> None:
    assert keep_ratio(size, short, 1333) == expected


@pytest.mark.parametrize("short", [9, 33], ids=["shrink", "enlarge"])
def test_resizing_is_bilinear_without_antialiasing_and_nearest_for_masks(short: int) -> None:
    image, target = example(17, 23, [[3.0, 2.0, 11.0, 9.0], [0.0, 0.0, 23.0, 17.0]])
    resized, changed = ResizeKeepRatio((short,), 1333)(image, target)
    height, width = resized.shape[-2:]
    assert (height, width) == keep_ratio((17, 23), short, 1333)
    reference = bilinear_reference(image.float(), height, width)
    assert (resized.float() - reference).abs().max() <= 1  # uint8 is rounded after each axis
    rows = [int(y * 17 / height) for y in range(height)]
    columns = [int(x * 23 / width) for x in range(width)]
    assert torch.equal(changed["masks"], target["masks"][:, rows][:, :, columns])
    factors = torch.tensor([width / 23, height / 17] * 2)
    torch.testing.assert_close(changed["boxes"].as_subclass(Tensor), target["boxes"].as_subclass(Tensor) * factors)


def test_a_crop_cuts_image_boxes_and_masks_alike() -> None:
    image, target = example(40, 50, [[3.0, 2.0, 11.0, 9.0], [20.0, 10.0, 30.0, 22.0]])
    sizes = set()
    for seed in range(60):
        torch.manual_seed(seed)
        cut, changed = RandomRangeCrop(12, 18)(image, target)
        height, width = cut.shape[-2:]
        sizes |= {height, width}
        top, left = next(
            (y, x)
            for y in range(40 - height + 1)
            for x in range(50 - width + 1)
            if torch.equal(cut, image[:, y : y + height, x : x + width])
        )
        assert torch.equal(changed["masks"], target["masks"][:, top : top + height, left : left + width])
        for mask, box in zip(changed["masks"], changed["boxes"].tolist(), strict=True):
            area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
            assert area == int(mask.sum())
    assert sizes == set(range(12, 19))


def test_images_below_the_range_keep_their_size_and_place() -> None:
    image, target = example(10, 40, [[0.0, 0.0, 5.0, 5.0]])
    cut, _ = RandomRangeCrop(12, 18)(image, target)
    assert cut.shape[-2] == 10
    assert 12 <= cut.shape[-1] <= 18


def test_objects_without_an_extent_are_dropped_and_none_may_be_left() -> None:
    image, target = example(40, 40, [[0.0, 0.0, 2.0, 2.0], [30.0, 30.0, 40.0, 40.0]])
    counts = set()
    for seed in range(60):
        torch.manual_seed(seed)
        kept = drop_empty(RandomRangeCrop(12, 18)(image, target)[1])
        counts.add(len(kept["labels"]))
        assert len(kept["boxes"]) == len(kept["labels"]) == len(kept["masks"])
        assert type(kept["boxes"]) is Tensor
        assert (kept["boxes"][:, 2:] > kept["boxes"][:, :2]).all()
    assert counts == {0, 1}


@pytest.mark.parametrize("policy", ["multiscale", "single"])
def test_a_flip_mirrors_image_boxes_and_masks(policy: str) -> None:
    image, target = example(32, 40, [[3.0, 2.0, 11.0, 9.0]])
    mirrored = as_example(
        image.flip(-1), torch.tensor([[29.0, 2.0, 37.0, 9.0]]), target["labels"], target["masks"].flip(-1)
    )
    for seed in range(8):
        torch.manual_seed(seed)
        flipped, after = train_transform(replace(SMALL, policy=policy, flip=1.0))(image, target)
        torch.manual_seed(seed)
        plain, before = train_transform(replace(SMALL, policy=policy, flip=0.0))(*mirrored)
        torch.testing.assert_close(flipped, plain)
        torch.testing.assert_close(after["boxes"], before["boxes"])
        assert policy == "single" or torch.equal(after["masks"], before["masks"])


def test_multiscale_crops_every_second_image_and_draws_every_size() -> None:
    image, target = example(30, 40, [[3.0, 2.0, 11.0, 9.0]])
    transform = train_transform(SMALL)
    whole = {keep_ratio((30, 40), short, SMALL.max_size) for short in SMALL.sizes}
    sizes = [transform(image, target)[0].shape[-2:] for _ in range(300)]
    assert {min(size) for size in sizes if max(size) < SMALL.max_size} == {24, 30}
    assert max(max(size) for size in sizes) <= SMALL.max_size
    uncropped = sum(tuple(size) in whole for size in sizes)
    assert 120 < uncropped < 200  # half of 300, and crops of the same ratio by chance


def test_single_has_one_size() -> None:
    image, target = example(30, 40, [[3.0, 2.0, 11.0, 9.0]])
    transform = train_transform(replace(SMALL, policy="single"))
    assert {tuple(transform(image, target)[0].shape) for _ in range(10)} == {(3, 28, 37)}


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    image, target = example(30, 40, [[3.0, 2.0, 11.0, 9.0]])
    trained = train_transform(replace(SMALL, policy="none"))(image, target)
    evaluated = eval_transform(SMALL)(image, target)
    assert torch.equal(trained[0], evaluated[0])
    assert trained[0].dtype == torch.float32
    assert 0 <= trained[0].min() < trained[0].max() <= 1
    assert trained[1]["masks"].dtype == torch.uint8


def test_defaults_are_the_published_pipeline() -> None:
    augment = DetectionAugment()
    assert augment.sizes == tuple(range(480, 801, 32))
    assert (augment.crop_sizes, augment.crop_range) == ((400, 500, 600), (384, 600))
    assert (augment.policy, augment.flip, augment.size, augment.max_size) == ("multiscale", 0.5, 800, 1333)


@pytest.mark.parametrize(
    "changes", [{"sizes": ()}, {"crop_range": (30, 20)}, {"size": 0}, {"flip": 1.5}], ids=lambda c: next(iter(c))
)
def test_settings_that_make_no_sense_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}"):
        replace(SMALL, **changes)
