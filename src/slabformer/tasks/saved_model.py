"""A classifier as one safetensors file: weights, and in the header all it takes to build the model and feed it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from slabformer._extras import require
from slabformer.models.weights.hub import weights_file
from slabformer.settings import (
    Arguments,
    ClassNames,
    NonEmptyStr,
    Number,
    Pixels,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
)
from slabformer.tasks.saved_file import SavedInfo, load_with_info, save_with_info


@dataclass(frozen=True, kw_only=True)
class ModelInfo(SavedInfo):
    """What a saved model is and what it expects."""

    KEY = "slabformer"
    model: NonEmptyStr
    """Name in timm."""
    model_args: Arguments = field(default_factory=dict)
    """Further arguments of ``timm.create_model``."""
    class_names: ClassNames
    """By label."""
    input_size: tuple[PositiveInt, Pixels, Pixels] = (3, 224, 224)
    """Channels, height, width."""
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    """Subtracted from RGB in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Divides what is left."""
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    """How images are resized."""
    crop_pct: PositiveFraction = 0.875
    """Centre crop over the resized shorter side."""

    @property
    def title(self) -> str:
        """What errors call the model."""
        return self.model

    def build(self) -> nn.Module:
        """The model as timm builds it.

        Raises:
            ValueError: If the arguments are not those of an architecture: a file may not name another one to load.
        """
        # here, so that the package can be used without timm
        from slabformer.models.arguments import check_arguments

        check_arguments(self.model, self.model_args)
        return create_model(self.model, **self.model_args)

    def check_model(self, model: nn.Module) -> None:
        """See :meth:`SavedInfo.check_model`; a model without names passes."""
        classes, named = getattr(model, "num_classes", None), len(self.class_names)
        if named and classes is not None and classes != named:
            raise ValueError(f"class_names must name the {classes} classes of {self.model}, got {named} names")

    @classmethod
    def restore(cls, values: dict[str, Any]) -> dict[str, Any]:
        """JSON's lists as tuples."""
        return super().restore(values) | {
            name: tuple(values.get(name, getattr(cls, name))) for name in ("input_size", "mean", "std")
        }


def save_model(model: nn.Module, path: str | Path, info: ModelInfo) -> ModelInfo:
    """Write a classifier to ``path``: see :func:`slabformer.tasks.saved_file.save_with_info`."""
    return save_with_info(model, path, info)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelInfo]:
    """The model that :func:`save_model` wrote to ``path``, in eval mode, and what it is.

    Published ``.pth`` files name no model: build it and call :func:`slabformer.load_published`.

    Args:
        path: The file, a folder that `slab push` wrote, or ``hf-hub:user/name``.
        device: Where the model goes.

    Raises:
        FileNotFoundError: If there is no such file.
        ConnectionError: If the hub cannot be reached.
        ValueError: If it is truncated, altered, or no model of ours, or does not fit the model it names.
    """
    return load_with_info(weights_file(path), ModelInfo, device)


def create_model(name: str, *, pretrained: bool = False, **model_args: Any) -> nn.Module:
    """``timm.create_model`` whose errors name what is near.

    Raises:
        ValueError: If timm does not know ``name``, or the model refuses an argument.
    """
    timm = require("timm", extra="vision")
    from slabformer.models.registry import check_model_name

    check_model_name(name)
    try:
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except TypeError as error:
        raise ValueError(f"{name} refuses its arguments ({error})") from error
    except (AssertionError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        if pretrained or not model_args:
            raise
        raise ValueError(f"{name} refuses its arguments ({error or type(error).__name__})") from error
