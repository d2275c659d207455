"""From a recipe to the objects that train it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from slabformer._extras import require
from slabformer.models.arguments import check_arguments
from slabformer.models.registry import is_ours
from slabformer.models.weights.hub import weights_file
from slabformer.tasks.classification.config import ModelConfig, TrainConfig
from slabformer.tasks.conversion import apply_norms_, norm_arguments
from slabformer.tasks.saved_file import check_saved
from slabformer.tasks.saved_model import ModelInfo, create_model, load_model

logger = logging.getLogger(__name__)
#: stands for the data's number of classes
ANY_CLASSES = 2


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model of ``config``, its weights loaded and its norms converted, and its arguments for ``timm.create_model``.

    Raises:
        ValueError: If timm does not know it, refuses an argument, or the file in ``weights`` holds something else.
    """
    if config.weights is not None:
        model, arguments = _load(config, config.weights, num_classes, image_size)
    else:
        arguments = model_arguments(config, num_classes, image_size)
        model = create_model(config.name, pretrained=config.pretrained, **arguments)
    apply_norms_(model, config, arguments, config.name)
    return model, arguments


def check_model(config: ModelConfig, image_size: int) -> None:
    """Refuse a model that could not be built, before data is read; the number of classes is not known by then.

    Raises:
        FileNotFoundError: If the file in ``weights`` is missing.
        PermissionError: If it cannot be read.
        ValueError: As :func:`build_model`, as far as that can be told without memory for weights.
    """
    if config.weights is not None:
        check_saved(weights_file(config.weights), ModelInfo)
    check_arguments(config.name, config.args)
    if is_ours(config.name):  # timm has models that cannot be built like this
        arguments = model_arguments(config, ANY_CLASSES, image_size)
        with torch.device("meta"):
            create_model(config.name, **arguments)


def model_arguments(config: ModelConfig, num_classes: int, image_size: int) -> dict[str, Any]:
    """What ``timm.create_model`` is given: ``img_size`` only where the model's own is another.

    Raises:
        ValueError: If one of ``config.args`` is not of the model's architecture.
    """
    check_arguments(config.name, config.args)
    default = require("timm.models", extra="vision").get_pretrained_cfg(config.name)
    own = default.input_size[-1] if default is not None else None
    size = {} if image_size == own else {"img_size": image_size}
    return {"num_classes": num_classes, **size, **config.args, **norm_arguments(config, is_ours(config.name))}


def _load(config: ModelConfig, path: str, num_classes: int, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    model, info = load_model(path)
    if info.fused:
        raise ValueError(f"{path} holds a fused model, whose norms are gone; train from the file before fusing")
    if info.model != config.name:
        raise ValueError(f"{path} holds {info.model!r}, model.name is {config.name!r}; make them agree")
    if info.input_size[-1] != image_size:
        raise ValueError(f"{path} is for images of {info.input_size[-1]}, data.image_size is {image_size}")
    differing = sorted(key for key, value in config.args.items() if info.model_args.get(key) != value)
    if differing:
        raise ValueError(f"model.args.{differing[0]} differs from {path}, which brings its own; leave it out")
    if len(info.class_names) != num_classes:
        logger.info("new head: %s has %d classes, the data %d", path, len(info.class_names), num_classes)
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model.train(), {**info.model_args, "num_classes": num_classes}


def info_of(config: TrainConfig, model_args: dict[str, Any], class_names: list[str]) -> ModelInfo:
    """What the file of a trained model says of it, so that it can be built and fed again."""
    data = config.data
    return ModelInfo(
        model=config.model.name,
        model_args=model_args,
        class_names=class_names,
        input_size=(3, data.image_size, data.image_size),
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
    )
