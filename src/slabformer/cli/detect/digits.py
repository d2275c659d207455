"""`slab detect digits`: write the embedded data set as COCO lays its files out."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from slabformer.settings import FolderToWrite, PositiveInt, Seed
from slabformer.tasks.detection.config import NUM_IMAGES


def parser() -> ArgumentParser:
    """Options of `slab detect digits`."""

    made = ArgumentParser(
        prog="slab detect digits",
        description="Write digits pasted on photographs with boxes and masks, in COCO's layout: "
        "OUT/{train2017,val2017,annotations}. `--data OUT` then means the same images as `--data digits`.",
    )
    made.add_argument("out", type=FolderToWrite, help="a folder that is not there yet")
    made.add_argument("--num-train", type=PositiveInt, default=NUM_IMAGES["train"], help="images to train on")
    made.add_argument(
        "--num-validation", type=PositiveInt, default=NUM_IMAGES["validation"], help="images to evaluate on"
    )
    made.add_argument("--seed", type=Seed, default=0, help="of everything random")
    return made


def run(config: Namespace) -> None:
    """Write and say where."""
    from slabformer.tasks.detection.digits import write_digits

    write_digits(config.out, num_train=config.num_train, num_validation=config.num_validation, seed=config.seed)
    sys.stdout.write(f"{config.out}\n")
