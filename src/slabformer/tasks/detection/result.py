"""What a detector's training leaves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from slabformer.models.detection.mask_rcnn import Detector
from slabformer.tasks.detection.saved import load_detector
from slabformer.tasks.engine.folder import RunFolder
from slabformer.tasks.engine.observers import CsvFile

logger = logging.getLogger(__name__)

#: of the twelve numbers of COCO, those of an epoch's row, for boxes and for masks
SCORES = ("ap", "ap50", "ap75", "aps", "apm", "apl")
#: columns of metrics.csv
COLUMNS = (
    *("epoch", "step", "gamma", "lr", "train_loss", "images_per_second"),
    *(f"{prefix}{kind}_{score}" for prefix in ("", "blend_") for kind in ("box", "mask") for score in SCORES),
)
#: what the loss is the sum of, without and with masks
BOX_LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
MASK_LOSSES = (*BOX_LOSSES, "loss_mask")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What :func:`slabformer.tasks.detection.train.train` leaves, beside the files."""

    detector: Detector
    """Trained and recalibrated, in eval mode, on the device it was trained on."""
    history: list[dict[str, float]]
    """Rows of ``metrics.csv``: every epoch's train_loss, gamma, lr, images_per_second; box_ap, mask_ap ... of evaluated
    ones, blend_* while gamma was above 0."""
    metrics: dict[str, float]
    """Of the final detector: box_ap, box_ap50, mask_ap ..., of those that the data has objects for."""
    output: Path
    """Folder of the run, with ``model.safetensors``."""
    already_finished: bool = False
    """Nothing was trained: the run in ``output`` was complete."""


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.csv`` in ``folder``."""
    return CsvFile(folder / "metrics.csv", COLUMNS).rows()


def finished_before(folder: RunFolder) -> TrainResult:
    """The result of a run that was complete; the detector is on the CPU."""
    logger.info("%s is finished already; --overwrite true starts again", folder.path)
    return TrainResult(
        detector=load_detector(folder.path / "model.safetensors")[0],
        history=read_history(folder.path),
        metrics=folder.result(),
        output=folder.path,
        already_finished=True,
    )
