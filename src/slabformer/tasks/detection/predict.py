"""What is where on pictures: boxes, masks, names and scores, picture by picture, whatever some of them are."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from slabformer._listing import matches
from slabformer.tasks.detection.annotations import decode_runs, encode_mask
from slabformer.tasks.detection.config import DetectionAugment
from slabformer.tasks.detection.drawing import draw_objects
from slabformer.tasks.detection.evaluate import Detection, Size, at_original_size
from slabformer.tasks.detection.saved import DetectorInfo
from slabformer.tasks.detection.transforms import as_example, eval_transform
from slabformer.tasks.images import UNREADABLE, expand_paths, read_image, reason_of

#: one image ``(3, H, W)`` in [0, 1] to what is on it, in its pixels, masks not pasted
Detect = Callable[[Tensor], Detection]


@dataclass(frozen=True)
class FoundObject:
    """One object on a picture."""

    label: int
    """From 1 on."""
    name: str
    score: float
    box: list[float]
    """Left, top, right, bottom in the picture's pixels."""
    mask: dict[str, Any] | None = None
    """Run lengths as COCO has them; None from a detector of boxes alone."""


@dataclass(frozen=True)
class PicturePrediction:
    """What is on one picture, best first, or why it could not be read."""

    path: str
    objects: list[FoundObject]
    size: tuple[int, int] | None = None
    """Height and width when upright; None where it could not be read."""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def predict(
    detect: Detect, info: DetectorInfo, paths: Sequence[str | Path], *, score: float = 0.3
) -> Iterator[PicturePrediction]:
    """What is on every picture, in order, as they are done; pictures are prepared as for evaluation.

    Args:
        detect: The detector that ``info`` describes, on one image.
        info: The size of its images, and the names of its classes.
        paths: Image files; see :func:`picture_paths` for folders and patterns.
        score: Least score of an object.

    Yields:
        One prediction a picture; ``error`` is set where one cannot be read.

    Raises:
        ValueError: If ``score`` is not between 0 and 1.
    """
    if not 0 <= score <= 1:
        raise ValueError(f"score must be between 0 and 1, got {score}")
    transform = eval_transform(DetectionAugment(policy="none", size=info.size, max_size=info.max_size))
    for path in paths:
        try:
            picture = F.pil_to_tensor(read_image(path))
        except UNREADABLE as error:
            yield PicturePrediction(str(path), [], error=reason_of(error))
            continue
        image, _ = transform(*as_example(picture, torch.zeros(0, 4), torch.zeros(0), None))
        found = detect(image.as_subclass(Tensor))
        yield _prediction(str(path), found, _size_of(image), _size_of(picture), info, score)


def draw(prediction: PicturePrediction) -> Tensor:
    """The picture, read again, with everything found on it: uint8 ``(3, H, W)``.

    Raises:
        OSError, SyntaxError, ValueError, ...: If it cannot be read.
    """
    picture = F.pil_to_tensor(read_image(prediction.path))
    objects = prediction.objects
    boxes = torch.tensor([found.box for found in objects]).reshape(-1, 4)
    labels = torch.tensor([found.label for found in objects])
    captions = [f"{found.name} {found.score:.2f}" for found in objects]
    masks = [torch.from_numpy(decode_runs(found.mask)) for found in objects if found.mask is not None]
    return draw_objects(picture, boxes, labels, captions, torch.stack(masks).bool() if masks else None)


def on_device(detector: Callable[[list[Tensor]], list[Detection]], device: torch.device) -> Detect:
    """A detector of lists of images on ``device`` as one of single images from anywhere."""

    @torch.inference_mode()
    def detect(image: Tensor) -> Detection:
        return detector([image.to(device)])[0]

    return detect


def picture_paths(given: Iterable[str]) -> list[Path]:
    """``given`` with patterns and folders replaced by the images they mean.

    Raises:
        ValueError: If a pattern or a folder means no image.
    """
    paths: list[str] = []
    for path in given:
        found = matches(path) if glob.has_magic(path) else [path]
        if not found:
            raise ValueError(f"no file matches {path!r}")
        paths += found
    return expand_paths(paths)


def _prediction(
    path: str, found: Detection, size: Size, original_size: Size, info: DetectorInfo, score: float
) -> PicturePrediction:
    kept = found["scores"] >= score
    found = {name: value[kept] for name, value in found.items()}
    placed = at_original_size(found, size, original_size)
    masks = placed.get("masks")
    codes = [None] * len(placed["boxes"]) if masks is None else [encode_mask(mask.numpy()) for mask in masks]
    rows = zip(*(placed[name].tolist() for name in ("labels", "scores", "boxes")), codes, strict=True)
    objects = [FoundObject(label, info.class_names[label - 1], *rest) for label, *rest in rows]
    return PicturePrediction(path, objects, original_size)


def _size_of(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]
