"""`slab detect digits`: write the embedded data set as COCO lays its files out."""

from __future__ import annotations

from argparse import SUPPRESS

from jsonargparse import Namespace

from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FolderToWrite, PositiveInt, Seed


def parser() -> Parser:
    """Options of `slab detect digits`."""
    from slabformer.tasks.detection.config import NUM_IMAGES

    made = Parser(
        "slab detect digits",
        "Write digits pasted on photographs with boxes and masks, in COCO's layout: train2017, val2017 and annotations "
        "in one folder. `--data FOLDER` then means the same images as `--data digits`.",
        ["slab detect digits --output example --num-train 20 --num-validation 5"],
    )
    made.add_argument("--output", type=FolderToWrite | None, help="a folder that is not there yet")
    made.add_argument("folder", type=FolderToWrite | None, nargs="?", help=SUPPRESS)  # as before 0.2
    made.add_argument("--num-train", type=PositiveInt, default=NUM_IMAGES["train"], help="images to train on")
    made.add_argument(
        "--num-validation", type=PositiveInt, default=NUM_IMAGES["validation"], help="images to evaluate on"
    )
    made.add_argument("--seed", type=Seed, default=0, help="seed of everything random")
    return made


def run(config: Namespace) -> Outcome:
    """Write.

    Raises:
        ValueError: If no folder is given, or two.
    """
    from slabformer.tasks.detection.digits import write_digits

    if (config.output is None) == (config.folder is None):
        raise ValueError("where to? give one folder: --output FOLDER")
    folder = config.output or config.folder
    write_digits(folder, num_train=config.num_train, num_validation=config.num_validation, seed=config.seed)
    return Outcome(data={"train": config.num_train, "validation": config.num_validation}, files=[folder])
