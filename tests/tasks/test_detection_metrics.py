"""COCO's numbers: known ones, the same from both libraries, over all ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coco_files import coco_dataset, coco_object, two_objects_each
from distributed import run_ranks
from slabformer.tasks.detection.annotations import CocoAnnotations, encode_mask
from slabformer.tasks.detection.digits import make_digits
from slabformer.tasks.detection.metrics import NAMES, CocoMetrics, DetectionResult, shown

#: one library adds the smallest double to a denominator
SAME = 1e-13
BACKENDS = ["pycocotools", "faster-coco-eval"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def metrics_of(*objects: dict[str, Any], num_images: int = 1, **options: Any) -> CocoMetrics:
    dataset = coco_dataset([(200, 200)] * num_images, list(objects))
    return CocoMetrics(CocoAnnotations(dataset, "test"), **{"masks": False, **options})


def detections(*boxes: list[float], scores: list[float] | None = None, label: int = 1) -> tuple[Tensor, ...]:
    count = len(boxes)
    made = torch.tensor(boxes, dtype=torch.float32).reshape(count, 4)
    return made, torch.full((count,), label), torch.tensor(scores or [0.9] * count)


@each_backend
def test_one_object_found_at_an_iou_of_72_percent_gives_half_the_thresholds(backend: Any) -> None:
    metrics = metrics_of(coco_object(1, 1, [0, 0, 100, 100]), backend=backend)
    metrics.add(1, *detections([0, 0, 72, 100]))
    result = metrics.compute()
    assert result.box["AP"] == pytest.approx(50)
    assert [result.box[name] for name in ("AP50", "AP75", "APl")] == pytest.approx([100, 0, 50])
    assert result.box["APs"] is None
    assert shown(result.box["APs"]) == "-"
    assert shown(result.box["AP"]) == "50.0"
    assert [row.box_ap for row in result.per_class] == [pytest.approx(50), None, None]
    assert [row.num_objects for row in result.per_class] == [1, 0, 0]


@each_backend
def test_a_false_detection_above_a_true_one_halves_precision(backend: Any) -> None:
    metrics = metrics_of(coco_object(1, 1, [0, 0, 100, 100]), backend=backend)
    metrics.add(1, *detections([100, 100, 200, 200], [0, 0, 100, 100], scores=[0.9, 0.8]))
    assert metrics.compute().box["AP"] == pytest.approx(50)


@each_backend
def test_crowds_are_neither_found_nor_missed(backend: Any) -> None:
    crowd = coco_object(2, 1, [100, 100, 100, 100], iscrowd=1)
    crowd["segmentation"] = encode_mask(np.pad(np.ones((100, 100), np.uint8), ((100, 0), (100, 0))))
    metrics = metrics_of(coco_object(1, 1, [0, 0, 100, 100]), crowd, backend=backend)
    metrics.add(1, *detections([110, 110, 150, 150], [0, 0, 100, 100], scores=[0.9, 0.8]))
    result = metrics.compute()
    assert result.box["AP"] == pytest.approx(100)
    assert result.per_class[0].num_objects == 1


@each_backend
def test_no_detection_at_all_is_zero(backend: Any) -> None:
    metrics = metrics_of(coco_object(1, 1, [0, 0, 100, 100]), masks=True, backend=backend)
    metrics.add(1, *detections(), torch.zeros(0, 200, 200, dtype=torch.bool))
    result = metrics.compute()
    assert result.box["AP"] == result.mask["AP"] == 0


@each_backend
def test_masks_are_sorted_by_their_own_area(backend: Any) -> None:
    """A thin mask in a large box is small: 30 pixels."""
    mask = torch.zeros(1, 200, 200, dtype=torch.bool)
    mask[0, 0, :30] = True
    row = coco_object(1, 1, [0, 0, 30, 100], area=30, segmentation=encode_mask(mask[0].numpy()))
    wrong = torch.zeros(1, 200, 200, dtype=torch.bool)
    wrong[0, 150, 100:130] = True
    metrics = metrics_of(row, masks=True, backend=backend)
    boxes, labels, scores = detections([0, 0, 30, 100], [100, 100, 180, 180], scores=[0.8, 0.9])
    metrics.add(1, boxes, labels, scores, torch.cat([mask, wrong]))
    # by its box the false one would be medium, and not count among the small
    assert metrics.compute().mask["APs"] == pytest.approx(50)


@each_backend
def test_images_that_were_not_evaluated_do_not_count(backend: Any) -> None:
    objects = [coco_object(image, image, [0, 0, 100, 100]) for image in (1, 2)]
    metrics = metrics_of(*objects, num_images=2, backend=backend)
    metrics.add(2, *detections([0, 0, 100, 100]))
    result = metrics.compute()
    assert (result.box["AP"], result.num_images) == (pytest.approx(100), 1)
    assert result.per_class[0].num_objects == 1


def noisy_detections(metrics: CocoMetrics, annotations: CocoAnnotations) -> None:
    """What a mediocre detector finds."""
    generator = torch.Generator().manual_seed(0)
    for image in annotations.images:
        rows = [row for row in annotations.objects[image.id] if torch.rand((), generator=generator) < 0.8]
        boxes = annotations.boxes(rows, image)
        boxes += torch.randn(boxes.shape, generator=generator) * 2
        labels = annotations.labels(rows)
        labels = torch.where(torch.rand(len(rows), generator=generator) < 0.2, labels % 10 + 1, labels)
        masks = annotations.masks(rows, image).bool().roll(1, dims=2)
        metrics.add(image.id, boxes, labels, torch.rand(len(rows), generator=generator), masks)


def figures(result: DetectionResult) -> list[float]:
    """All of them in a row, NaN where there is none."""
    rows = [(row.box_ap, row.box_ap50, row.mask_ap, row.mask_ap50) for row in result.per_class]
    found = [*result.box.values(), *result.mask.values(), *itertools.chain(*rows)]
    return [float("nan") if value is None else value for value in found]


def test_both_libraries_agree() -> None:
    annotations = CocoAnnotations(make_digits("validation", num_images=40)[0], "digits")
    results = []
    for backend in BACKENDS:
        metrics = CocoMetrics(annotations, masks=True, backend=backend)  # type: ignore[arg-type]
        noisy_detections(metrics, annotations)
        results.append(metrics.compute())
    first, second = map(figures, results)
    assert first == pytest.approx(second, rel=SAME, nan_ok=True)
    assert len(first) == 12 + 12 + 4 * 10
    assert tuple(results[0].box) == NAMES
    assert 20 < results[0].box["AP"] < 90
    assert 20 < results[0].mask["AP"] < 90
    classes = [row.box_ap for row in results[0].per_class if row.box_ap is not None]
    assert np.mean(classes) == pytest.approx(results[0].box["AP"])


def test_what_is_there_is_found_completely() -> None:
    annotations = CocoAnnotations(two_objects_each([(64, 48)] * 2), "test")
    metrics = CocoMetrics(annotations, masks=True)
    for image in annotations.images:
        rows = annotations.usable(image)
        masks = annotations.masks(rows, image).bool()
        metrics.add(image.id, annotations.boxes(rows, image), annotations.labels(rows), torch.ones(2), masks)
    result = metrics.compute()
    assert (result.box["AP"], result.mask["AP"]) == pytest.approx((100, 100))
    assert [row.mask_ap for row in result.per_class] == pytest.approx([100, None, 100])


def test_results_are_coco_rows_that_json_takes() -> None:
    metrics = metrics_of(coco_object(1, 1, [0, 0, 100, 100]), masks=True)
    masks = torch.zeros(1, 200, 200, dtype=torch.bool)
    masks[0, :5, :7] = True
    metrics.add(1, *detections([10.5, 20, 72, 100], label=3), masks)
    (row,) = json.loads(json.dumps(metrics.results()))
    assert (row["image_id"], row["category_id"], row["bbox"]) == (1, 90, [10.5, 20, 61.5, 80])
    assert row["segmentation"] == encode_mask(masks[0].numpy())
    assert isinstance(row["segmentation"]["counts"], str)


def test_run_lengths_are_taken_as_they_are() -> None:
    code = encode_mask(np.ones((200, 200), np.uint8))
    metrics = metrics_of(coco_object(1, 1, [0, 0, 200, 200]), masks=True)
    metrics.add(1, *detections([0, 0, 200, 200]), [code])
    assert metrics.compute().mask["AP"] == pytest.approx(100)


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="unknown backend 'mmdet'"):
        metrics_of(backend="mmdet")
    with pytest.raises(ValueError, match="no image was evaluated"):
        metrics_of().compute()
    with pytest.raises(ValueError, match="pass masks=False"):
        metrics_of(masks=True).add(1, *detections([0, 0, 1, 1]))
    twice = metrics_of()
    twice.add(1, *detections())
    with pytest.raises(ValueError, match="image 1 was added before"):
        twice.add(1, *detections())


def half_of_the_images(rank: int, num_ranks: int) -> dict[str, Any]:
    objects = [coco_object(image, image, [0, 0, 100, 100]) for image in (1, 2)]
    metrics = metrics_of(*objects, num_images=2)
    metrics.add(rank + 1, *detections([0, 0, 100, 100] if rank == 0 else [0, 0, 20, 20]))
    result = metrics.compute()
    return {"images": result.num_images, "AP50": result.box["AP50"], "rows": len(metrics.results())}


@pytest.mark.slow
def test_ranks_see_the_figures_of_all(tmp_path: Path) -> None:
    expected = {"images": 2, "AP50": pytest.approx(100 * 51 / 101), "rows": 2}
    assert run_ranks(half_of_the_images, tmp_path) == [expected] * 2
