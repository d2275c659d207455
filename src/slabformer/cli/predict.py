"""`slab predict`: name what is on images."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.table import Table

from slabformer.cli.common import add_model_options
from slabformer.cli.data import add_device_option, load_trained, progress_bar
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import NonEmptyStr, PositiveInt

if TYPE_CHECKING:
    from slabformer.tasks.classification.predict import Prediction

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Options of `slab predict`."""
    made = Parser(
        "slab predict",
        "The likeliest classes of images: photographs turned upright, transparency laid on white. An image that cannot "
        "be read costs one line and, when the others are done, exit code 1.",
        [
            "slab predict runs/digits/model.safetensors digit.png",
            "slab predict slab_deit_tiny --pretrained holiday.jpg photos/ --top 3 --json",
        ],
        json_files=True,
    )
    add_model_options(made)
    made.add_argument("images", type=NonEmptyStr, nargs="+", help="image files, and folders of them")
    add_device_option(made)
    made.add_argument("--top", type=PositiveInt, default=5, help="classes an image")
    made.add_argument("--batch-size", type=PositiveInt, default=32, help="images per batch")
    return made


def run(config: Namespace) -> Outcome:
    """Predict; images that could not be read are a fault, told after all others are done."""
    from slabformer.tasks.classification.predict import predict
    from slabformer.tasks.images import expand_paths

    model, info = load_trained(config)
    paths = expand_paths(config.images)
    predictions: list[Prediction] = []
    with progress_bar("predict", len(paths)) as advance:
        for prediction in predict(model, info, paths, top=config.top, batch_size=config.batch_size):
            predictions.append(prediction)
            advance()
            if prediction.error is not None:
                logger.warning("cannot read %s: %s", prediction.path, prediction.error)
    failed = sum(prediction.error is not None for prediction in predictions)
    return Outcome(
        data=[prediction.to_dict() for prediction in predictions],
        shown=[_table(predictions)] if any(prediction.guesses for prediction in predictions) else [],
        fault=f"{failed} of {len(predictions)} images could not be read" if failed else "",
    )


def _table(predictions: list[Prediction]) -> Table:
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for prediction in predictions:
        for rank, guess in enumerate(prediction.guesses):
            last = rank == len(prediction.guesses) - 1
            figure = f"{100 * guess.probability:.2f} %"
            table.add_row("" if rank else prediction.path, guess.name, figure, end_section=last)
    return table
