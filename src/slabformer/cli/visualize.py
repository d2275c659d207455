"""`slab visualize`: what a token attends to, several models side by side."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from slabformer.cli.common import is_file, load, needs_weights
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, FigureToWrite, Fraction, NonEmptyStr, NonNegativeInt, Pixels

if TYPE_CHECKING:
    from PIL import Image

    from slabformer.figures.attention_picture import Panel

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Options of `slab visualize`."""
    made = Parser(
        "slab visualize",
        "What a token attends to: the effective attention of chosen layers and heads over the image and token by "
        "token, softmax and linear alike, for several models in one figure.",
        [
            "slab visualize deit_tiny_patch16_224 slab_deit_tiny --pretrained",
            "slab visualize slab_deit_tiny=slab_deit_tiny.pth --image dog.jpg --at 0.3 0.6",
            "slab visualize slab_pvt_tiny --layers 0 stages.3.blocks.1 --heads 0 1",
        ],
    )
    made.add_argument(
        "models", type=NonEmptyStr, nargs="+", help=".safetensors files, names that timm knows, or NAME=PUBLISHED.pth"
    )
    made.add_argument("--pretrained", action="store_true", help="download the released weights of models given by name")
    made.add_argument("--input-size", type=Pixels | None, help="height and width of the image, if not the models' own")
    made.add_argument("--image", type=ExistingFile | None, help="by default a flower that comes with scikit-learn")
    made.add_argument(
        "--layers",
        type=NonEmptyStr,
        nargs="+",
        default=["0", "-1"],
        help="places among those that can be shown, or names",
    )
    made.add_argument("--heads", type=NonNegativeInt, nargs="+", help="a row for each; by default their mean")
    made.add_argument(
        "--at", type=Fraction, nargs=2, default=[0.5, 0.5], metavar=("X", "Y"), help="the token, as shares of the image"
    )
    made.add_argument(
        "--without-local", action="store_true", help="show linear attention also without its depthwise convolution"
    )
    made.add_argument("--output", type=FigureToWrite, default=Path("attention.png"), help="the figure")
    return made


def run(config: Namespace) -> Outcome:
    """Record, draw, write.

    Raises:
        ValueError: If a layer cannot be shown, or the image cannot be read.
    """
    from slabformer.figures.attention_picture import attention_figure
    from slabformer.figures.plots import save

    path = config.output
    image = _image(config.image)
    columns = [column for model in config.models for column in _columns(config, model, image)]
    rows = list(zip(*columns, strict=True))
    save(attention_figure(rows, at=(config.at[0], config.at[1]), heads=config.heads), path)
    return Outcome(data={"models": [column[0].model for column in columns]}, files=[path])


def _image(path: Path | None) -> Image.Image:
    from PIL import Image

    from slabformer._extras import require
    from slabformer.tasks.images import UNREADABLE, read_image

    if path is None:
        return Image.fromarray(require("sklearn.datasets", extra="train").load_sample_image("flower.jpg"))
    try:
        return read_image(path)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"cannot read {path} as an image ({error})") from error


def _columns(config: Namespace, given: str, image: Image.Image) -> list[list[Panel]]:
    """The wanted layers of one model; then once more, if it is asked for, without their local branch."""
    import torch

    from slabformer.figures.attention_maps import padded_size, pick, record
    from slabformer.figures.attention_picture import Panel
    from slabformer.tasks.classification.augment import eval_transform
    from slabformer.tasks.classification.predict import data_config

    name, _, checkpoint = given.partition("=")
    source = Namespace(
        model=name,
        checkpoint=Path(checkpoint) if checkpoint else None,
        pretrained=config.pretrained and not checkpoint,
        input_size=config.input_size,
    )
    model, info = load(source)
    title = f"{info.model} ({Path(name).stem})" if is_file(name) else name
    if needs_weights(source):
        logger.warning("%s has random weights: its attention means nothing; --pretrained fetches released ones", name)
        title += " (random weights)"
    pixels = eval_transform(data_config(info))(image)[None]
    layers = record(model, pixels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    shown = (pixels[0] * std + mean).clamp(0, 1)
    panels = [
        Panel(model=title, image=shown, padded=padded_size(model, pixels), layer=pick(layers, wanted))
        for wanted in config.layers
    ]
    return [panels, *_without_local(panels)] if config.without_local else [panels]


def _without_local(panels: list[Panel]) -> list[list[Panel]]:
    if all(panel.layer.kernels is None for panel in panels):
        return []
    bare = [replace(panel, layer=panel.layer.without_local(), model=f"{panel.model}, without DWC") for panel in panels]
    return [bare]
