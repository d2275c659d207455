"""`slab detect export`: write a detector as ONNX, compared with PyTorch on images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from jsonargparse import Namespace

from slabformer.cli.detect.common import add_picture_options, compared_pictures
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, NonNegativeFloat, OutputFile, Pixels, PositiveInt


def parser() -> Parser:
    """Options of `slab detect export`."""
    from slabformer._defaults import MAX_CANDIDATES, RUNTIME_PIXELS

    made = Parser(
        "slab detect export",
        "Write a detector as ONNX for one image of up to a fixed size, compared with PyTorch on images. Masks come out "
        "inside their boxes, 28x28.",
        [
            "slab detect export fused.safetensors --output detector.onnx --data digits",
            "slab detect export fused.safetensors --output portrait.onnx --size 1333 800",
        ],
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


def run(config: Namespace) -> Outcome:
    """Export and compare; the file appears when it has passed."""
    from slabformer.export.detector import export_detector
    from slabformer.tasks.detection.saved import DetectorInfo, load_detector

    output = config.output
    detector, info = load_detector(config.model)
    images = compared_pictures(config, info)
    agreement = export_detector(
        detector,
        images,
        output,
        size=tuple(config.size or (info.size, info.max_size)),
        max_candidates=config.max_candidates,
        pixels=config.pixels,
        metadata={DetectorInfo.KEY: info.to_json()},
    )
    size = output.stat().st_size
    told = (
        f"{output}: {size / 1e6:.1f} MB; {agreement.num_detections} detections on {agreement.num_images} images agree "
        f"with PyTorch: boxes to {agreement.max_pixels:.1e} pixels, scores to {agreement.max_score:.1e}"
    )
    return Outcome(data={"path": output, "bytes": size, "agreement": asdict(agreement)}, shown=[told])
