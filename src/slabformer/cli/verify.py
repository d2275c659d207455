"""`slab verify`: compare the outputs of two models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from slabformer._defaults import RTOL
from slabformer.cli.common import example_images
from slabformer.settings import ExistingPath, PositiveInt, Tolerance

if TYPE_CHECKING:
    from torch import Tensor

    from slabformer.tasks.saved_model import ModelInfo


def parser() -> ArgumentParser:
    """Options of `slab verify`."""

    made = ArgumentParser(
        prog="slab verify",
        description="Compare the outputs of two models; exit code 1 when they differ by more than --rtol, or 4 times "
        "the distance of the reference's own outputs to those in float64.",
    )
    made.add_argument(
        "reference", type=ExistingPath, help="what is right: a .safetensors file or a folder that slab wrote"
    )
    made.add_argument("candidate", type=ExistingPath, help="what should equal it, its fused form for example")
    made.add_argument(
        "--images", type=ExistingPath, nargs="+", default=[], help="image files or folders; random by default"
    )
    made.add_argument("--batch-size", type=PositiveInt, default=8, help="images at a time, and number of random ones")
    made.add_argument("--rtol", type=Tolerance, default=RTOL, help="largest difference, relative to outputs' scale")
    return made


def run(config: Namespace) -> None:
    """Print the differences.

    Raises:
        VerificationError: If they are too large.
        ValueError: If the models take different images.
    """
    from slabformer.surgery.verify import verify
    from slabformer.tasks.saved_model import load_model

    (reference, info), (candidate, other) = load_model(config.reference), load_model(config.candidate)
    if info.input_size != other.input_size:
        raise ValueError(
            f"{config.reference} takes images of {info.input_size}, {config.candidate} of {other.input_size}"
        )
    batches = read_batches(config.images, info, config.batch_size) or [example_images(info, config.batch_size)]
    result = verify(reference, candidate, batches, config.rtol)
    own = result.note if result.own_error is None else f"{result.own_error:.3e}"
    sys.stdout.write(
        f"{'largest difference':<24}{result.max_abs:.3e}\n"
        f"{'relative to the scale':<24}{result.max_rel:.3e} ({result.allowed:.3e} allowed)\n"
        f"{'rounding of reference':<24}{own}\n"
        f"{'same top-1':<24}{result.top1_agreement:.1%} of {sum(map(len, batches))}"
        f"{' random' * (not config.images)} images\n"
    )


def read_batches(paths: list[Path], info: ModelInfo, batch_size: int) -> list[Tensor]:
    """The images in ``paths``, files or folders, as the model ``info`` wants them."""
    import torch

    from slabformer.tasks.classification.augment import eval_transform
    from slabformer.tasks.classification.predict import data_config
    from slabformer.tasks.images import expand_paths, read_image

    transform = eval_transform(data_config(info))
    images = [transform(read_image(file)) for file in expand_paths(paths)]
    return [torch.stack(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
