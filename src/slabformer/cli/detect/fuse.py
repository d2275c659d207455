"""`slab detect fuse`: fold the norms of a detector's backbone, compare detections, save."""

from __future__ import annotations

from dataclasses import asdict

from jsonargparse import Namespace
from rich.console import RenderableType

from slabformer.cli.detect.common import add_picture_options, compared_pictures
from slabformer.cli.fuse import add_keep_option, fuse_table
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, ModelToWrite, NonNegativeFloat


def parser() -> Parser:
    """Options of `slab detect fuse`."""
    from slabformer._defaults import PIXELS

    made = Parser(
        "slab detect fuse",
        "Fold every norm of the backbone into its neighbours, compare detections, save. Detections stay the same; maps "
        "inside the backbone do where --keep names them. A detector has no other methods that could be asked to stay.",
        ["slab detect fuse model.safetensors --data photos -o fused.safetensors"],
        json_files=True,
    )
    made.add_argument("model", type=ExistingFile, help="a .safetensors file that `slab detect train` wrote")
    made.add_argument("--output", type=ModelToWrite, required=True, help="the fused detector, a .safetensors file")
    add_keep_option(made, "body.body.stages.*")
    add_picture_options(made)
    made.add_argument(
        "--pixels", type=NonNegativeFloat, default=PIXELS, help="largest distance of a box's edge that passes"
    )
    return made


def run(config: Namespace) -> Outcome:
    """Fuse, compare, save; nothing is saved that detects something else."""
    from torch import nn

    from slabformer.deployment.detector import fuse_detector, verify_detections
    from slabformer.tasks.detection.saved import load_detector, save_detector

    output = config.output
    detector, info = load_detector(config.model)
    if info.fused:
        raise ValueError(f"{config.model} is fused already")
    images = compared_pictures(config, info)
    fused, report = fuse_detector(detector, keep=config.keep)
    if config.data is None:  # on noise a detector is sure of nothing
        for form in (detector, fused):
            form.roi_heads.score_thresh = 0.0
    agreement = verify_detections(detector, fused, images, config.pixels)
    shown: list[RenderableType] = [
        fuse_table(report),
        f"{report.summary()}\n{agreement.num_detections} detections on {agreement.num_images} "
        f"{'random ' * (config.data is None)}images agree: boxes to {agreement.max_pixels:.1e} pixels, "
        f"scores to {agreement.max_score:.1e}",
    ]
    layernorms = sum(isinstance(module, nn.LayerNorm) for module in fused.modules())
    if layernorms:
        shown.append(f"{layernorms} LayerNorms stay; trained with --model.output-norm prepbn, output norms fold too")
    save_detector(fused, output, info)
    return Outcome(data={**report.to_dict(), "agreement": asdict(agreement)}, shown=shown, files=[output])
