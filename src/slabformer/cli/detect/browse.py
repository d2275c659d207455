"""`slab detect browse`: a picture of what training sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jsonargparse import Namespace

from slabformer._files import replaced
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.recipe import recipe_parser, settings_of
from slabformer.settings import NonNegativeInt, OutputFile, PositiveInt
from slabformer.tasks.detection.config import TrainConfig


def parser() -> Parser:
    """Options of `slab detect browse`: those of training that decide what it sees."""
    from slabformer.tasks.detection.config import Split

    made = recipe_parser(
        "slab detect browse",
        "Draw the first images of an epoch as they are trained on, with boxes, masks and names.",
        TrainConfig,
        examples=[
            "slab detect browse --data photos --output batches.png",
            "slab detect browse --config recipes/detection_slab_swin_tiny_1x.yaml --num 32",
        ],
        sections=("data", "augment", "seed"),
    )
    made.add_argument(
        "--output",
        dest="picture",
        type=Annotated[Path, OutputFile(".png", ".jpg", ".jpeg", ".webp")],
        default=Path("batches.png"),
        aliases=["--out"],
        help="the picture",
    )
    made.add_argument("--num", type=PositiveInt, default=16, help="images in it")
    made.add_argument("--epoch", type=NonNegativeInt, default=0, help="whose order and augmentation")
    made.add_argument("--split", type=Split, default="train", help="which images")
    return made


def run(config: Namespace) -> Outcome:
    """Draw."""
    from slabformer.tasks.detection.browse import browse
    from slabformer.tasks.detection.drawing import to_pil
    from slabformer.tasks.detection.loader import create_loader

    settings = settings_of(parser(), config)
    picture = config.picture
    loader = create_loader(settings["data"], settings["augment"], config.split, batch_size=4, seed=settings["seed"])
    with replaced(picture) as temporary:
        to_pil(browse(loader, config.num, epoch=config.epoch)).save(temporary)
    return Outcome(data={"images": min(config.num, loader.order.count), "split": config.split}, files=[picture])
