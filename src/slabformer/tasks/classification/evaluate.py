"""Accuracy of the deployed form, the same for any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slabformer.surgery.batches import eval_mode
from slabformer.tasks.classification.data import Batch, check_num_classes
from slabformer.tasks.classification.real_labels import RealLabels

TOP_K = 5


@dataclass(frozen=True)
class ClassResult:
    """How one class fares."""

    name: str
    images: int
    top1: float | None
    """Share of 1; None without images."""


@dataclass(frozen=True)
class EvalResult:
    """Accuracies as shares of 1, mean cross-entropy, and speed with reading included.

    Attributes:
        loss: Mean cross-entropy, without label smoothing.
        top1: Share of images whose first class is right.
        top5: Share of images whose class is among the first five; None with fewer than five classes.
        images: Number of images, over all ranks.
        images_per_s: Images a second over all ranks, decoding included.
        per_class: One row a class, where asked for.
        real_top1: Share of images whose first class is among their real labels, where those were given.
        real_images: Number of images that have any.
    """

    loss: float
    top1: float
    top5: float | None
    images: int
    images_per_s: float
    per_class: list[ClassResult] | None = None
    real_top1: float | None = None
    real_images: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    per_class: bool = False,
    real: RealLabels | None = None,
    progress: Any = None,
) -> EvalResult:
    """Evaluate ``model`` in eval mode, which is the deployed form; its mode is put back afterwards.

    For the blend while gamma is above 0: ``with sf.blended(model): evaluate(model, loader)``.

    Args:
        model: Classifier, ``(B, 3, H, W)`` to ``(B, num_classes)``.
        loader: Batches of images and labels, every image once over all ranks; its ``class_names`` name the classes.
        device: Where to run; the accelerator's or the model's own by default.
        accelerator: accelerate's ``Accelerator``: sums over ranks, in its precision.
        per_class: Also report every class.
        real: Also hold the first class against these; the loader then reads a ``NumberedSource``.
        progress: Called with every batch's number of images.

    Raises:
        ValueError: If the loader is empty, or its classes are not the model's.
    """
    device = torch.device(device or (accelerator.device if accelerator is not None else _device_of(model)))
    start = time.perf_counter()
    with eval_mode(model):
        sums = _sums(model, loader, device, accelerator, real, progress)
    sums = accelerator.reduce(sums, "sum") if accelerator is not None else sums
    sums = sums.cpu().to(torch.float64)
    result = _result(sums, time.perf_counter() - start, getattr(loader, "class_names", None), per_class)
    if real is None:
        return result
    known, right = sums[:, 4:].sum(0).tolist()
    return replace(result, real_top1=right / known if known else None, real_images=int(known))


@torch.inference_mode()
def _sums(
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device,
    accelerator: Any,
    real: RealLabels | None,
    progress: Any,
) -> Tensor:
    """Images, top-1 hits, top-5 hits, summed loss, images with real labels and hits of those, ``(num_classes, 6)``."""
    sums: Tensor | None = None
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        labels, accepted = (labels, labels[:, None]) if real is None else real.split(labels)
        logits = _forward(model, images, accelerator).float()
        if sums is None:
            num_classes = logits.shape[-1]
            check_num_classes(getattr(loader, "class_names", [""] * num_classes), num_classes)
            # float32 counts exactly up to 2**24, and not every accelerator has float64
            sums = torch.zeros(num_classes, 6, device=device)
        sums.index_add_(0, labels, _scores(logits, labels, accepted))
        if progress is not None:
            progress(len(labels))
    if sums is not None:
        return sums
    names = getattr(loader, "class_names", None)
    if accelerator is None or accelerator.num_processes == 1 or names is None:
        raise ValueError("nothing to evaluate: the loader gave no batch")
    return torch.zeros(len(names), 6, device=device)  # other ranks have the images


def _forward(model: nn.Module, images: Tensor, accelerator: Any) -> Tensor:
    if accelerator is None:
        return model(images)
    with accelerator.autocast():
        return model(images)


def _scores(logits: Tensor, labels: Tensor, accepted: Tensor) -> Tensor:
    """One, top-1 hit, top-5 hit, loss, whether any class is accepted and the first is, of every image: ``(B, 6)``."""
    hits = logits.topk(min(TOP_K, logits.shape[-1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    known, right = (accepted >= 0).any(dim=1), (logits.argmax(dim=1, keepdim=True) == accepted).any(dim=1)
    columns = (torch.ones_like(loss), hits[:, 0], hits.any(dim=1), loss, known, right)
    return torch.stack([column.float() for column in columns], dim=1)


def _result(sums: Tensor, seconds: float, names: list[str] | None, per_class: bool) -> EvalResult:
    images, top1, top5, loss = sums[:, :4].sum(0).tolist()
    rows = None
    if per_class:
        names = names or [str(label) for label in range(len(sums))]
        rows = [
            ClassResult(name, int(row[0]), row[1] / row[0] if row[0] else None)
            for name, row in zip(names, sums.tolist(), strict=True)
        ]
    return EvalResult(
        loss=loss / images,
        top1=top1 / images,
        top5=top5 / images if len(sums) >= TOP_K else None,
        images=int(images),
        images_per_s=images / seconds,
        per_class=rows,
    )


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
