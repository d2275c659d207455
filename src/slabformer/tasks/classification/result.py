"""What a training run leaves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from slabformer.tasks.engine.folder import RunFolder
from slabformer.tasks.engine.observers import CsvFile
from slabformer.tasks.saved_model import load_model

logger = logging.getLogger(__name__)

#: columns of metrics.csv
COLUMNS = (
    *("epoch", "step", "gamma", "lr", "train_loss", "images_per_second"),
    *(f"{prefix}{name}" for prefix in ("", "blend_", "ema_") for name in ("top1", "top5", "loss")),
)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What :func:`slabformer.tasks.classification.train.train` leaves, beside the files."""

    model: nn.Module
    """Trained and recalibrated, in eval mode, on the device it was trained on."""
    ema: nn.Module | None
    """The averaged model, recalibrated by itself."""
    history: list[dict[str, float]]
    """Rows of ``metrics.csv``: every epoch's train_loss, gamma, lr, images_per_second, top1, loss; blend_* while
    gamma is above 0, ema_* where there is an average."""
    metrics: dict[str, float]
    """Of the recalibrated model: top1, loss, top5 with five classes or more; ema_* alike."""
    output: Path
    """Folder of the run, with ``model.safetensors``."""
    already_finished: bool = False
    """Nothing was trained: the run in ``output`` was complete."""


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.csv`` in ``folder``."""
    return CsvFile(folder / "metrics.csv", COLUMNS).rows()


def finished_before(folder: RunFolder) -> TrainResult:
    """The result of a run that was complete; the models are on the CPU."""
    logger.info("%s is finished already; --overwrite true starts again", folder.path)
    ema = folder.path / "ema.safetensors"
    return TrainResult(
        model=load_model(folder.path / "model.safetensors")[0],
        ema=load_model(ema)[0] if ema.exists() else None,
        history=read_history(folder.path),
        metrics=folder.result(),
        output=folder.path,
        already_finished=True,
    )
