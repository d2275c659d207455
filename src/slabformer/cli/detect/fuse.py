"""`slab detect fuse`: fold the norms of a detector's backbone, compare detections, save."""

from __future__ import annotations

from dataclasses import asdict

from jsonargparse import ArgumentParser, Namespace

from slabformer._defaults import PIXELS
from slabformer._files import write_json
from slabformer.cli.common import console
from slabformer.cli.detect.common import add_picture_options, compared_pictures
from slabformer.cli.fuse import fuse_table
from slabformer.settings import ExistingFile, FileToWrite, ModelToWrite, NonNegativeFloat


def parser() -> ArgumentParser:
    """Options of `slab detect fuse`."""

    made = ArgumentParser(
        prog="slab detect fuse", description="Fold every norm of the backbone into its neighbours, verify, save."
    )
    made.add_argument("model", type=ExistingFile, help="a .safetensors file that `slab detect train` wrote")
    made.add_argument("--output", type=ModelToWrite, required=True, help="the fused detector, a .safetensors file")
    made.add_argument("--json", type=FileToWrite | None, help="also write where each norm went, as JSON")
    add_picture_options(made)
    made.add_argument(
        "--pixels", type=NonNegativeFloat, default=PIXELS, help="largest distance of a box's edge that passes"
    )
    return made


def run(config: Namespace) -> None:
    """Fuse, compare, print, save; nothing is saved that detects something else."""
    from torch import nn

    from slabformer.deployment.detector import fuse_detector, verify_detections
    from slabformer.tasks.detection.saved import load_detector, save_detector

    files = [path for path in (config.output, config.json) if path is not None]
    detector, info = load_detector(config.model)
    if info.fused:
        raise ValueError(f"{config.model} is fused already")
    images = compared_pictures(config, info)
    fused, report = fuse_detector(detector)
    if config.data is None:  # on noise a detector is sure of nothing
        for form in (detector, fused):
            form.roi_heads.score_thresh = 0.0
    agreement = verify_detections(detector, fused, images, config.pixels)
    output = console()
    output.print(fuse_table(report))
    output.print(
        f"{report.summary()}\n{agreement.num_detections} detections on {agreement.num_images} "
        f"{'random ' * (config.data is None)}images agree: boxes to {agreement.max_pixels:.1e} pixels, "
        f"scores to {agreement.max_score:.1e}"
    )
    layernorms = sum(isinstance(module, nn.LayerNorm) for module in fused.modules())
    if layernorms:
        output.print(f"{layernorms} LayerNorms stay; trained with --model.output_norm prepbn, output norms fold too")
    save_detector(fused, config.output, info)
    if config.json is not None:
        write_json(config.json, {**report.to_dict(), "agreement": asdict(agreement)})
    output.print("saved", *map(str, files), soft_wrap=True)
