"""`slab detect export`: write a detector as ONNX, compared with PyTorch on images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from jsonargparse import ArgumentParser, Namespace

from slabformer._defaults import MAX_CANDIDATES, RUNTIME_PIXELS
from slabformer._files import replaced
from slabformer.cli.data import ExamplesFormatter
from slabformer.cli.detect.common import add_picture_options, compared_pictures
from slabformer.settings import ExistingFile, NonNegativeFloat, OutputFile, Pixels, PositiveInt

EXAMPLES = """examples:
  slab detect export fused.safetensors --output detector.onnx --data digits
  slab detect export fused.safetensors --output portrait.onnx --size 1333 800
"""


def parser() -> ArgumentParser:
    """Options of `slab detect export`."""

    made = ArgumentParser(
        prog="slab detect export",
        description="Write a detector as ONNX for one image of up to a fixed size, compared with PyTorch on images. "
        "Masks come out inside their boxes, 28x28.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    made.add_argument("model", type=ExistingFile, help="a .safetensors file that `slab detect train` or `fuse` wrote")
    made.add_argument(
        "--output", type=Annotated[Path, OutputFile(".onnx")], required=True, help="the file, detector.onnx"
    )
    made.add_argument(
        "--size", type=Pixels | None, nargs=2, help="largest height and width; by default landscape, as in evaluation"
    )
    made.add_argument(
        "--max-candidates", type=PositiveInt, default=MAX_CANDIDATES, help="boxes that enter the last suppression"
    )
    add_picture_options(made)
    made.add_argument(
        "--pixels", type=NonNegativeFloat, default=RUNTIME_PIXELS, help="largest distance of a box's edge"
    )
    return made


def run(config: Namespace) -> None:
    """Export and compare; the file appears when it has passed."""
    from slabformer.export.detector import export_detector
    from slabformer.tasks.detection.saved import DetectorInfo, load_detector

    detector, info = load_detector(config.model)
    images = compared_pictures(config, info)
    with replaced(config.output) as temporary:
        agreement = export_detector(
            detector,
            images,
            temporary,
            size=tuple(config.size or (info.size, info.max_size)),
            max_candidates=config.max_candidates,
            pixels=config.pixels,
            metadata={DetectorInfo.KEY: info.to_json()},
        )
    sys.stdout.write(
        f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB; {agreement.num_detections} detections on "
        f"{agreement.num_images} images agree with PyTorch: boxes to {agreement.max_pixels:.1e} pixels, scores to "
        f"{agreement.max_score:.1e}\n"
    )
