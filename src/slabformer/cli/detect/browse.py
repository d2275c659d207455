"""`slab detect browse`: a picture of what training sees."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from jsonargparse import ArgumentParser, Namespace

from slabformer._files import replaced
from slabformer.cli.recipe import config_of, recipe_parser
from slabformer.settings import NonNegativeInt, OutputFile, PositiveInt
from slabformer.tasks.detection.config import Split, TrainConfig


def parser() -> ArgumentParser:
    """Options of `slab detect browse`: those of training, of which data and augmentation count."""

    made = recipe_parser("slab detect browse", "", "recipes/detection_slab_swin_tiny_1x.yaml", TrainConfig)
    made.description = "Draw the first images of an epoch as they are trained on, with boxes, masks and names."
    made.usage = "slab detect browse [--data PATH] [--config RECIPE] [--out FILE] [--num N] [any key of training]"
    made.add_argument(
        "--out",
        type=Annotated[Path, OutputFile(".png", ".jpg", ".jpeg", ".webp")],
        default=Path("batches.png"),
        help="the picture",
    )
    made.add_argument("--num", type=PositiveInt, default=16, help="images in it")
    made.add_argument("--epoch", type=NonNegativeInt, default=0, help="whose order and augmentation")
    made.add_argument("--split", type=Split, default="train", help="which images")
    return made


def run(config: Namespace) -> None:
    """Draw and say where."""
    from slabformer.tasks.detection.browse import browse
    from slabformer.tasks.detection.drawing import to_pil
    from slabformer.tasks.detection.loader import create_loader

    settings = config_of(parser(), config, dict)
    loader = create_loader(settings["data"], settings["augment"], config.split, batch_size=4, seed=settings["seed"])
    with replaced(config.out) as temporary:
        to_pil(browse(loader, config.num, epoch=config.epoch)).save(temporary)
    sys.stdout.write(f"{config.out}\n")
