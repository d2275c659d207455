"""`slab verify`: compare the outputs of two models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from slabformer.cli.common import example_images
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingPath, PositiveInt, Tolerance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slabformer.tasks.saved_model import ModelInfo


def parser() -> Parser:
    """Options of `slab verify`."""
    from slabformer._defaults import RTOL

    made = Parser(
        "slab verify",
        "Compare the outputs of two models; exit code 1 when they differ by more than --rtol, or 4 times the distance "
        "of the reference's own outputs to those in float64.",
        [
            "slab verify runs/train/model.safetensors fused.safetensors",
            "slab verify model.safetensors fused.safetensors --images photos/ --rtol 1e-4",
        ],
    )
    made.add_argument(
        "reference", type=ExistingPath, help="what is right: a .safetensors file or a folder that slab wrote"
    )
    made.add_argument("candidate", type=ExistingPath, help="what should equal it, its fused form for example")
    add_comparison_options(made, RTOL)
    return made


def add_comparison_options(parser: Parser, rtol: float) -> None:
    """On which images, and how near."""
    parser.add_argument(
        "--images", type=ExistingPath, nargs="+", default=[], help="image files or folders; random by default"
    )
    parser.add_argument("--batch-size", type=PositiveInt, default=8, help="images at a time, and number of random ones")
    parser.add_argument("--rtol", type=Tolerance, default=rtol, help="largest difference, relative to outputs' scale")


def run(config: Namespace) -> Outcome:
    """The differences; a fault if they are too large.

    Raises:
        ValueError: If the models take different images.
    """
    from slabformer.tasks.saved_model import load_model

    (reference, info), (candidate, other) = load_model(config.reference), load_model(config.candidate)
    if info.input_size != other.input_size:
        raise ValueError(
            f"{config.reference} takes images of {info.input_size}, {config.candidate} of {other.input_size}"
        )
    return comparison(config, reference, candidate, info)


def comparison(config: Namespace, reference: nn.Module, candidate: nn.Module, info: ModelInfo) -> Outcome:
    """The differences on the images that the options name; a fault if they are too large."""
    from slabformer.surgery.verify import VerificationError, verify

    batches = read_batches(config.images, info, config.batch_size) or [example_images(info, config.batch_size)]
    try:
        result = verify(reference, candidate, batches, config.rtol)
    except VerificationError as error:
        return Outcome(data={"equal": False, "reason": str(error)}, fault=str(error))
    own = result.note if result.own_error is None else f"{result.own_error:.3e}"
    images = sum(map(len, batches))
    lines = (
        f"{'largest difference':<24}{result.max_abs:.3e}",
        f"{'relative to the scale':<24}{result.max_rel:.3e} ({result.allowed:.3e} allowed)",
        f"{'rounding of reference':<24}{own}",
        f"{'same top-1':<24}{result.top1_agreement:.1%} of {images}{' random' * (not config.images)} images",
    )
    return Outcome(data={"equal": True, **asdict(result), "images": images}, shown=lines)


def read_batches(paths: list[Path], info: ModelInfo, batch_size: int) -> list[Tensor]:
    """The images in ``paths``, files or folders, as the model ``info`` wants them."""
    import torch

    from slabformer.tasks.classification.augment import eval_transform
    from slabformer.tasks.classification.predict import data_config
    from slabformer.tasks.images import expand_paths, read_image

    transform = eval_transform(data_config(info))
    images = [transform(read_image(file)) for file in expand_paths(paths)]
    return [torch.stack(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
