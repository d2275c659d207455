"""COCO's twelve numbers for boxes and for masks, gathered over ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from slabformer._extras import require
from slabformer.tasks.detection.annotations import CocoAnnotations, encode_mask
from slabformer.tasks.engine.devices import gather

Backend = Literal["auto", "faster-coco-eval", "pycocotools"]
#: COCO's numbers in its order: precision (AP), then recall (AR) at 1, 10 and 100 detections; s, m, l by area
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
#: what COCO gives where there is nothing to find
UNDEFINED = -1.0


@dataclass(frozen=True)
class ClassResult:
    """Precision of one class in percent; None where it has no objects, or no masks are asked for."""

    name: str
    num_objects: int
    box_ap: float | None
    box_ap50: float | None
    mask_ap: float | None = None
    mask_ap50: float | None = None


@dataclass(frozen=True)
class DetectionResult:
    """What COCO's protocol says of detections, in percent; None where there is nothing to find."""

    num_images: int
    box: dict[str, float | None]
    """The :data:`NAMES` of boxes."""
    mask: dict[str, float | None] | None
    """The same of masks; None for boxes alone."""
    per_class: list[ClassResult]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def shown(value: float | None) -> str:
    """A figure for a table: one decimal, "-" where there is none."""
    return "-" if value is None else f"{value:.1f}"


class CocoMetrics:
    """Collects detections, then compares them with the annotations of the images that were added.

    Args:
        annotations: What there is to find; crowds are neither found nor missed, as COCO has it.
        masks: Whether to compare masks too.
        backend: pycocotools is the reference; faster-coco-eval gives the same numbers, rounding apart, in a tenth of
            the time and is taken by "auto" where it is installed.

    Raises:
        ValueError: If the backend is unknown.
    """

    def __init__(self, annotations: CocoAnnotations, *, masks: bool, backend: Backend = "auto") -> None:
        if backend not in ("auto", "faster-coco-eval", "pycocotools"):
            raise ValueError(f"unknown backend {backend!r}; use auto, faster-coco-eval or pycocotools")
        self.annotations, self.masks, self.backend = annotations, masks, backend
        self._detections: dict[int, list[dict[str, Any]]] = {}

    def add(
        self,
        image_id: int,
        boxes: Tensor,
        labels: Tensor,
        scores: Tensor,
        masks: Tensor | Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Note the detections of one image, none among them.

        Args:
            image_id: The annotations' id of it.
            boxes: Left, top, right, bottom in pixels of the original image, ``(n, 4)``.
            labels: Classes from 1 on, ``(n,)``.
            scores: ``(n,)``.
            masks: At the original size, ``(n, H, W)`` of bool, or RLE; needed if masks are compared.

        Raises:
            ValueError: If the image was added before, or masks are missing.
        """
        if image_id in self._detections:
            raise ValueError(f"image {image_id} was added before")
        if self.masks and masks is None:
            raise ValueError("masks are to be compared and none were given; pass masks=False for boxes alone")
        sides = boxes[:, 2:] - boxes[:, :2]
        rows = [
            {"image_id": image_id, "category_id": self.annotations.category_ids[label - 1], "bbox": box, "score": score}
            for label, box, score in zip(
                labels.tolist(), np.hstack([boxes[:, :2].cpu(), sides.cpu()]).tolist(), scores.tolist(), strict=True
            )
        ]
        if self.masks and masks is not None:
            for row, mask in zip(rows, masks, strict=True):
                row["segmentation"] = encode_mask(mask.cpu().numpy()) if isinstance(mask, Tensor) else mask
        self._detections[image_id] = rows

    def results(self) -> list[dict[str, Any]]:
        """All detections of all ranks in COCO's format for results, by image; every rank must ask."""
        return [row for rows in self._gathered().values() for row in rows]

    def compute(self) -> DetectionResult:
        """The figures over all ranks, on every rank; every rank must ask.

        Raises:
            ValueError: If no image was added.
        """
        gathered = self._gathered()
        if not gathered:
            raise ValueError("no image was evaluated; is the validation set empty?")
        box = self._evaluate(gathered, "bbox")
        mask = self._evaluate(gathered, "segm") if self.masks else None
        return DetectionResult(
            num_images=len(gathered),
            box=_summary(box),
            mask=_summary(mask) if mask is not None else None,
            per_class=self._per_class(box, mask, gathered),
        )

    def _gathered(self) -> dict[int, list[dict[str, Any]]]:
        return dict(sorted((image_id, rows) for part in gather(self._detections) for image_id, rows in part.items()))

    def _evaluate(self, gathered: dict[int, list[dict[str, Any]]], kind: str) -> Any:
        """An evaluator of either library, done."""
        # numbered from 1 on, whatever the file has: COCO's tools take an object of id 0 that was found for a miss
        objects = [{**row, "id": number} for number, row in enumerate(self.annotations.truth(), start=1)]
        truth = {"info": {}, **self.annotations.dataset, "annotations": objects}
        with contextlib.redirect_stdout(io.StringIO()):  # both tell of every step
            return _run(self.backend, truth, list(gathered), _detections(gathered, kind), kind)

    def _per_class(self, box: Any, mask: Any, gathered: dict[int, list[dict[str, Any]]]) -> list[ClassResult]:
        counts = dict.fromkeys(self.annotations.category_ids, 0)
        for image_id in gathered:
            for row in self.annotations.objects.get(image_id, []):
                if row["category_id"] in counts and not row.get("iscrowd", 0):
                    counts[row["category_id"]] += 1
        names = self.annotations.class_names
        return [
            ClassResult(name, counts[category], *_of_class(box, index), *_of_class(mask, index))
            for index, (category, name) in enumerate(zip(self.annotations.category_ids, names, strict=True))
        ]


def _detections(gathered: dict[int, list[dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    rows = [row for rows in gathered.values() for row in rows]
    if kind == "bbox":
        return [{key: value for key, value in row.items() if key != "segmentation"} for row in rows]
    # beside a box, COCO's tools would sort masks into small, medium and large by the box's area
    return [{key: value for key, value in row.items() if key != "bbox"} for row in rows]


def _run(backend: Backend, truth: dict[str, Any], images: list[int], rows: list[dict[str, Any]], kind: str) -> Any:
    if backend == "auto":
        backend = "faster-coco-eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
    if backend == "faster-coco-eval":
        library = require("faster_coco_eval", extra="detection")
        create, evaluator = library.COCO, library.COCOeval_faster
    else:
        create = require("pycocotools.coco", extra="detection").COCO
        evaluator = require("pycocotools.cocoeval", extra="detection").COCOeval
    reference = create()
    reference.dataset = truth
    reference.createIndex()
    evaluation = evaluator(reference, _loaded(reference, create, rows), kind)
    evaluation.params.imgIds = images
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _loaded(reference: Any, create: Any, rows: list[dict[str, Any]]) -> Any:
    """Detections as the library keeps them; neither takes an empty list."""
    if rows:
        return reference.loadRes(rows)
    empty = create()
    empty.dataset = {**reference.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _summary(evaluation: Any) -> dict[str, float | None]:
    return {name: _percent(float(value)) for name, value in zip(NAMES, evaluation.stats[: len(NAMES)], strict=True)}


def _of_class(evaluation: Any, index: int) -> tuple[float | None, float | None]:
    """AP and AP50 of one class; see :class:`ClassResult`."""
    if evaluation is None:
        return None, None
    precision = evaluation.eval["precision"][:, :, index, 0, -1]  # (IoU, recall) of all areas, at most detections
    return tuple(_mean(part) for part in (precision, precision[:1]))  # type: ignore[return-value]


def _mean(values: np.ndarray) -> float | None:
    defined = values[values > UNDEFINED]
    return _percent(float(defined.mean())) if defined.size else None


def _percent(value: float) -> float | None:
    return None if value == UNDEFINED else 100 * value
