"""Several forms of one classifier on the same images: how well each does, and how often two agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from slabformer.cli.data import data_of, progress_bar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slabformer.tasks.classification.data import Loader
    from slabformer.tasks.classification.evaluate import EvalResult
    from slabformer.tasks.classification.sources import Split
    from slabformer.tasks.saved_model import ModelInfo


def loader_of(config: Namespace, info: ModelInfo, split: Split) -> Loader:
    """The images that the options describe, as in evaluation."""
    from slabformer.tasks.classification.config import AugmentConfig
    from slabformer.tasks.classification.data import create_loader

    return create_loader(
        data_of(config, info, split),
        AugmentConfig(policy="none"),
        split,
        batch_size=config.batch_size,
        seed=0,
        num_workers=config.num_workers,
        drop_last=False,
    )


def calibration_of(config: Namespace, info: ModelInfo) -> list[Tensor]:
    """``config.calibrate`` training images in batches, to show the ranges of activations."""
    config.batch_size = min(config.batch_size, config.calibrate)
    batches = islice(loader_of(config, info, "train"), -(-config.calibrate // config.batch_size))
    return [images for images, _ in batches]


def evaluated(config: Namespace, info: ModelInfo, forms: Mapping[str, nn.Module]) -> Iterator[tuple[str, EvalResult]]:
    """Accuracy of each form on the validation images."""
    from slabformer.tasks.classification.evaluate import evaluate

    for name, form in forms.items():
        loader = loader_of(config, info, "validation")
        with progress_bar(f"evaluate {name}", len(loader)) as advance:
            yield name, evaluate(form, loader, progress=advance)


def agreement_of(config: Namespace, info: ModelInfo, forms: Mapping[str, nn.Module]) -> float:
    """Share of validation images that both forms call the same."""
    import torch

    same: list[Tensor] = []
    for images, _ in loader_of(config, info, "validation"):
        one, other = (form(images).argmax(1) for form in forms.values())
        same.append(one == other)
    return float(torch.cat(same).float().mean())
