"""What is on an image: classes and their probabilities, image by image, whatever some of them are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._extras import require
from slabformer.surgery.batches import eval_mode
from slabformer.tasks.classification.augment import Transform, eval_transform
from slabformer.tasks.classification.config import DataConfig
from slabformer.tasks.images import UNREADABLE, read_image, reason_of
from slabformer.tasks.saved_model import ModelInfo

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Guess:
    """One class that an image may show."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, or why it could not be read."""

    path: str
    guesses: list[Guess]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def predict(
    model: nn.Module, info: ModelInfo, paths: Sequence[str | Path], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """The ``top`` likeliest classes of every image, in order, as they are done; images are prepared as for evaluation.

    Args:
        model: The classifier that ``info`` describes; it is run in eval mode, where it is.
        info: How to prepare images, and the names of its classes.
        paths: Image files; see :func:`slabformer.tasks.images.expand_paths` for folders.
        top: How many classes.
        batch_size: Images at once.

    Yields:
        One prediction an image; ``error`` is set and ``guesses`` empty where one cannot be read.

    Raises:
        ValueError: If ``top`` or ``batch_size`` is not positive, or the model does not have ``info``'s classes.
    """
    if top < 1 or batch_size < 1:
        raise ValueError(f"top and batch_size must be at least 1, got {top} and {batch_size}")
    transform = eval_transform(data_config(info))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        images, errors = _read(chunk, transform)
        guesses = iter(_guess(model, torch.stack(images).to(device), info, top) if images else [])
        for path, error in zip(chunk, errors, strict=True):
            yield Prediction(str(path), [] if error else next(guesses), error)


def data_config(info: ModelInfo, **options: Any) -> DataConfig:
    """The input that ``info`` describes, as a :class:`DataConfig`; ``options`` are its further fields.

    Raises:
        ValueError: If the model does not take square RGB images.
    """
    channels, height, width = info.input_size
    if channels != 3 or height != width:
        raise ValueError(f"{info.model} takes images of {info.input_size}; only square RGB images can be prepared")
    return DataConfig(
        image_size=height,
        mean=info.mean,  # type: ignore[arg-type]
        std=info.std,  # type: ignore[arg-type]
        interpolation=info.interpolation,  # type: ignore[arg-type]  # refused there if it is another
        crop_pct=info.crop_pct,
        **options,
    )


def deployed_transform(preprocessing: Mapping[str, Any]) -> Transform:
    """From an image to the input of a deployed classifier, float32 ``(3, H, W)``: see :func:`read_image` for the image.

    Args:
        preprocessing: Of its folder: ``sf.load_deployed(folder).manifest.preprocessing``.

    Raises:
        ValueError: If the folder holds none, or the model does not take square RGB images.
    """
    try:
        size = tuple(preprocessing[name] for name in ("channels", "height", "width"))
        values = {name: preprocessing[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    except KeyError as error:
        raise ValueError(
            f"the deployed model does not say how images become inputs ({error} is missing); "
            "write it with `slab deploy`, or give deployed.save(preprocessing=)"
        ) from error
    info = ModelInfo(
        **ModelInfo.restore({"model": "the deployed model", "class_names": [], "input_size": size, **values})
    )
    return eval_transform(data_config(info))


def class_names(info: ModelInfo, num_classes: int) -> list[str]:
    """The model's names for its classes, else ImageNet's where there are 1000, else numbers.

    Raises:
        ValueError: If the model names another number of classes.
    """
    if info.class_names and len(info.class_names) != num_classes:
        raise ValueError(f"{info.model} has {num_classes} classes and names for {len(info.class_names)}")
    if info.class_names:
        return info.class_names
    if num_classes == IMAGENET_CLASSES:
        imagenet = require("timm.data", extra="vision").ImageNetInfo()
        return [imagenet.index_to_description(label) for label in range(num_classes)]
    return [str(label) for label in range(num_classes)]


def _read(paths: Sequence[str | Path], transform: Transform) -> tuple[list[Tensor], list[str | None]]:
    """Tensors of the images that can be read, and for every path what went wrong, or None."""
    images, errors = [], list[str | None]()
    for path in paths:
        try:
            images.append(transform(read_image(path)))
            errors.append(None)
        except UNREADABLE as error:
            errors.append(reason_of(error))
    return images, errors


@torch.inference_mode()
def _guess(model: nn.Module, images: Tensor, info: ModelInfo, top: int) -> list[list[Guess]]:
    with eval_mode(model):
        probabilities = model(images).float().softmax(dim=-1)
    names = class_names(info, probabilities.shape[-1])
    values, labels = (t.tolist() for t in probabilities.topk(min(top, len(names))))
    return [
        [Guess(names[label], value) for value, label in zip(row, columns, strict=True)]
        for row, columns in zip(values, labels, strict=True)
    ]
