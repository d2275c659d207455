"""`slab detect predict`: what is where on pictures."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.markup import escape
from rich.table import Table

from slabformer._files import replaced
from slabformer.cli.data import add_device_option, device_called, progress_bar
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, FolderToWrite, Fraction, NonEmptyStr

if TYPE_CHECKING:
    from slabformer.tasks.detection.predict import Detect, PicturePrediction
    from slabformer.tasks.detection.saved import DetectorInfo

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Options of `slab detect predict`."""
    made = Parser(
        "slab detect predict",
        "Boxes, masks, names and scores of what is on pictures: photographs turned upright, transparency laid on "
        "white. A picture that cannot be read costs one line and, when the others are done, exit code 1.",
        [
            "slab detect predict runs/detection_digits/model.safetensors photo.jpg -o found",
            "slab detect predict detector.onnx photos/ 'more/*.png' --score 0.5 --json",
        ],
        json_files=True,
    )
    made.add_argument(
        "model", type=ExistingFile, help="a .safetensors file of `slab detect train` or `fuse`, or an .onnx file"
    )
    made.add_argument(
        "images", type=NonEmptyStr, nargs="+", help="image files, folders of them, and patterns like 'a/*.jpg'"
    )
    made.add_argument("--score", type=Fraction, default=0.3, help="least score of an object")
    made.add_argument(
        "--output",
        type=FolderToWrite | None,
        aliases=["--out"],
        help="folder for the pictures with what was found, as PNG",
    )
    add_device_option(made)
    return made


def run(config: Namespace) -> Outcome:
    """Predict and draw; pictures that could not be read are a fault, told after all others are done."""
    from slabformer.tasks.detection.drawing import to_pil
    from slabformer.tasks.detection.predict import draw, picture_paths, predict

    paths = picture_paths(config.images)
    detect, info = _load(config)
    if config.output is not None:
        config.output.mkdir(parents=True, exist_ok=True)
    predictions: list[PicturePrediction] = []
    with progress_bar("predict", len(paths)) as advance:
        for name, prediction in zip(
            picture_names(paths), predict(detect, info, paths, score=config.score), strict=True
        ):
            advance()
            if prediction.error is not None:
                logger.warning("cannot read %s: %s", prediction.path, prediction.error)
            elif config.output is not None:
                with replaced(config.output / name) as temporary:
                    to_pil(draw(prediction)).save(temporary)
            predictions.append(prediction)
    failed = sum(prediction.error is not None for prediction in predictions)
    return Outcome(
        data=[prediction.to_dict() for prediction in predictions],
        shown=[_table(predictions)],
        fault=f"{failed} of {len(predictions)} pictures could not be read" if failed else "",
    )


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each of ``paths``, no two alike: ``photo.png``, ``photo-2.png`` ..."""
    names: list[str] = []
    counts = Counter[str]()
    for path in paths:
        counts[path.stem] += 1
        number = counts[path.stem]
        names.append(f"{path.stem}.png" if number == 1 else f"{path.stem}-{number}.png")
    return names


def _load(config: Namespace) -> tuple[Detect, DetectorInfo]:
    from slabformer.export.detector import OnnxDetector
    from slabformer.tasks.detection.predict import on_device
    from slabformer.tasks.detection.saved import DetectorInfo, load_detector

    if config.model.suffix == ".onnx":
        exported = OnnxDetector(config.model)
        if DetectorInfo.KEY not in exported.metadata:
            raise ValueError(f"{config.model} does not name its classes; write it with `slab detect export`")
        return exported, DetectorInfo.from_json(exported.metadata[DetectorInfo.KEY])
    device = device_called(config.device)
    detector, info = load_detector(config.model, device)
    # the detector stops at its own threshold: asking for less must not be in vain
    detector.roi_heads.score_thresh = min(detector.roi_heads.score_thresh, config.score)
    return on_device(detector, device), info


def _table(predictions: Sequence[PicturePrediction]) -> Table:
    table = Table()
    table.add_column("picture", overflow="fold")
    for heading in ("object", "score", "left", "top", "right", "bottom"):
        table.add_column(heading, justify="left" if heading == "object" else "right")
    for prediction in predictions:
        if not prediction.objects and prediction.error is None:
            table.add_row(escape(prediction.path), "nothing", end_section=True)
        for rank, found in enumerate(prediction.objects):
            corners = (f"{value:.1f}" for value in found.box)
            last = rank == len(prediction.objects) - 1
            where = "" if rank else escape(prediction.path)
            table.add_row(where, escape(found.name), f"{found.score:.2f}", *corners, end_section=last)
    return table
