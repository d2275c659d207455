"""Average precision of a detector's deployed form, the same for any number of ranks and any batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.models.detection.paste import paste_masks, rescale_boxes
from slabformer.surgery.batches import eval_mode
from slabformer.tasks.detection.loader import DetectionBatch, DetectionLoader
from slabformer.tasks.detection.metrics import Backend, CocoMetrics, DetectionResult
from slabformer.tasks.engine.devices import to_device

Detection = dict[str, Tensor]
Size = tuple[int, int]


def evaluate(
    detector: nn.Module,
    loader: DetectionLoader,
    *,
    accelerator: Any = None,
    backend: Backend = "auto",
    progress: Callable[..., None] | None = None,
) -> DetectionResult:
    """Evaluate ``detector`` in eval mode, which is the deployed form; its mode is put back afterwards.

    For the blend while gamma is above 0: ``with sf.blended(detector): evaluate(detector, loader)``.

    Args:
        detector: On the device to run on; its classes are the loader's.
        loader: Every image once over all ranks.
        accelerator: accelerate's ``Accelerator``: runs in its precision.
        backend: Which library counts.
        progress: Called after every batch with its number of images.

    Raises:
        ValueError: If there is no image.
    """
    return collect(detector, loader, accelerator=accelerator, backend=backend, progress=progress).compute()


def collect(
    detector: nn.Module,
    loader: DetectionLoader,
    *,
    accelerator: Any = None,
    backend: Backend = "auto",
    progress: Callable[..., None] | None = None,
) -> CocoMetrics:
    """This rank's detections at the original size of their images; :func:`evaluate` says of what."""
    device = next(detector.parameters()).device
    metrics = CocoMetrics(loader.annotations, masks=loader.has_masks, backend=backend)
    with eval_mode(detector), torch.inference_mode():
        for batch in loader:
            detections = _detect(detector, to_device(batch, device), accelerator)
            for detection, target in zip(detections, batch.targets, strict=True):
                metrics.add(target["image_id"], **detection)
            if progress is not None:
                progress(len(batch))
    return metrics


def _detect(detector: nn.Module, batch: DetectionBatch, accelerator: Any) -> Iterator[Detection]:
    # images of different sizes would pad each other, and what is found would hang on the company
    alike = len({image.shape for image in batch.images}) == 1
    portions = [batch.images] if alike else [[image] for image in batch.images]
    targets = iter(batch.targets)
    for portion in portions:
        for image, found in zip(portion, _forward(detector, portion, accelerator), strict=True):
            yield at_original_size(found, (image.shape[-2], image.shape[-1]), next(targets)["original_size"])


def _forward(detector: nn.Module, images: list[Tensor], accelerator: Any) -> list[Detection]:
    if accelerator is None:
        return detector(images)
    with accelerator.autocast():
        return detector(images)


def at_original_size(found: Detection, size: Size, original_size: Size) -> Detection:
    """What a detector found on a resized image in pixels of the original, masks pasted: on the CPU.

    Args:
        found: "boxes", "labels", "scores", and "masks" where the detector has them.
        size: ``(H, W)`` of the image that the detector saw.
        original_size: ``(H, W)`` of the picture.
    """
    boxes = rescale_boxes(found["boxes"].float(), size, original_size)
    placed = {"boxes": boxes, "labels": found["labels"], "scores": found["scores"]}
    if "masks" in found:
        placed["masks"] = paste_masks(found["masks"], boxes, original_size)
    return {name: value.cpu() for name, value in placed.items()}


def flat(result: DetectionResult) -> dict[str, float]:
    """The figures that there are as ``box_ap``, ``box_ap50`` ... ``mask_arl``, in percent."""
    kinds = {"box": result.box, "mask": result.mask or {}}
    return {
        f"{kind}_{name.lower()}": value
        for kind, figures in kinds.items()
        for name, value in figures.items()
        if value is not None
    }
