"""A detector as one safetensors file: weights, and in the header all it takes to build it and to name what it finds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slabformer._detector import DetectorConfig
from slabformer.models.detection.backbones import check_backbone_arguments, create_backbone
from slabformer.models.detection.mask_rcnn import Detector, build_detector
from slabformer.settings import Arguments, CategoryId, ClassNames, NonEmptyStr, Pixels
from slabformer.tasks.saved_file import SavedInfo, load_with_info, save_with_info

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DetectorInfo(SavedInfo):
    """What a saved detector is, what it expects and what its labels mean."""

    KEY = "slabformer.detector"

    backbone: NonEmptyStr
    """Name for :func:`slabformer.models.detection.backbones.create_backbone`."""
    backbone_args: Arguments = field(default_factory=dict)
    """Its further arguments, ``norm``, ``output_norm`` and ``published`` among them."""
    detector: DetectorConfig
    """All but the backbone."""
    class_names: ClassNames
    """Of labels 1, 2, ..."""
    category_ids: list[CategoryId]
    """What annotations call them."""
    size: Pixels = 800
    """Shorter side of images in evaluation, in pixels."""
    max_size: Pixels = 1333
    """Longest side; it wins."""

    @property
    def title(self) -> str:
        """What errors call the detector."""
        return f"a detector on {self.backbone}"

    def build(self) -> Detector:
        """The detector with fresh weights.

        Raises:
            ValueError: If the arguments are not those of an architecture: a file may not name another one to load.
        """
        check_backbone_arguments(self.backbone, self.backbone_args)
        return build_detector(create_backbone(self.backbone, **self.backbone_args), self.detector)

    @classmethod
    def restore(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The detector's settings as such, JSON's lists in them as tuples."""
        settings: dict[str, Any] = values["detector"]
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        return super().restore(values) | {"detector": DetectorConfig(**settings)}

    def check_model(self, model: nn.Module) -> None:
        """See :meth:`SavedInfo.check_model`."""
        classes, named, numbered = self.detector.num_classes, len(self.class_names), len(self.category_ids)
        if not classes == named == numbered:
            raise ValueError(
                f"class_names and category_ids must be one for each of {classes} classes, got {named} and {numbered}"
            )


def compare_classes(info: DetectorInfo, class_names: list[str], what: str = "the data") -> None:
    """Refuse data of another number of classes than the detector's; say so where they are called otherwise.

    Raises:
        ValueError: With both numbers.
    """
    if len(info.class_names) != len(class_names):
        raise ValueError(
            f"the detector knows {len(info.class_names)} classes, {what} {len(class_names)}; to train it on, "
            "--model.new-predictors drops its layers that name classes and starts them anew"
        )
    pairs = zip(info.class_names, class_names, strict=True)
    different = [(label, *names) for label, names in enumerate(pairs, start=1) if names[0] != names[1]]
    if different:
        message = "%d classes are called otherwise than in the detector (first: label %d is %r here, %r there)"
        label, own, given = different[0]
        logger.warning(message, len(different), label, given, own)


def save_detector(detector: nn.Module, path: str | Path, info: DetectorInfo) -> DetectorInfo:
    """Write a detector, fused or not, to ``path``: see :func:`slabformer.tasks.saved_file.save_with_info`."""
    return save_with_info(detector, path, info)


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> tuple[Detector, DetectorInfo]:
    """The detector that :func:`save_detector` wrote to ``path``, in eval mode, and what it is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, altered, or no detector of ours.
    """
    detector, info = load_with_info(Path(path), DetectorInfo, device)
    assert isinstance(detector, Detector)
    return detector, info
