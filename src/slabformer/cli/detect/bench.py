"""`slab detect bench`: time a detector against its LayerNorm baseline, fused and not."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.console import Console

from slabformer._norm_names import OutputNormName
from slabformer.cli.common import available_device, is_file
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import DeviceName, FolderToWrite, NonEmptyStr, NonNegativeInt, Pixels, Seconds, Threads

if TYPE_CHECKING:
    from torch import Tensor

    from slabformer.models.detection.mask_rcnn import Detector
    from slabformer.tasks.detection.saved import DetectorInfo

LAYERNORM, SOFTMAX, GIVEN = "LayerNorm", "LayerNorm, softmax", "PRepBN"


def parser() -> Parser:
    """Options of `slab detect bench`."""
    made = Parser(
        "slab detect bench",
        "Time backbone (with feature pyramid) and whole detector (without pasting masks) on one image: with LayerNorm, "
        "with PRepBN, and fused, in turns in one process. Weights are random, whatever the file holds; scores are "
        "spread so that there are detections to make masks of.",
        [
            "slab detect bench swin_tiny_prepbn --threads 1 --output runs/latency",
            "slab detect bench slab_swin_tiny --size 800 1333 --no-compile",
        ],
    )
    made.add_argument(
        "model", type=NonEmptyStr, help="name of a backbone, or a .safetensors detector: its sizes are taken"
    )
    made.add_argument("--size", type=Pixels, nargs=2, default=[800, 1333], help="height and width of the image")
    made.add_argument(
        "--output-norm",
        type=OutputNormName | None,
        help="of the backbone's maps: prepbn folds as well",
    )
    made.add_argument(
        "--sampling-ratio", type=NonNegativeInt | None, help="of box features: 0 as published, 2 is faster"
    )
    made.add_argument("--device", type=DeviceName, default="cpu", metavar="DEVICE", help="where to run")
    made.add_argument("--threads", type=Threads | None, help="threads of torch on a CPU; all cores by default")
    made.add_argument("--compile", type=bool, default=True, help="also compiled backbones")
    made.add_argument("--seconds", type=Seconds, default=60.0, help="time to measure for")
    made.add_argument("--output", type=FolderToWrite | None, help="folder for latency.csv, latency.md and latency.json")
    return made


def run(config: Namespace) -> Outcome:
    """Measure and write."""
    import torch

    from slabformer.bench.detector import measure_latency
    from slabformer.measure.allocator import keep_memory

    device = available_device(config.device)
    keep_memory()  # for all forms alike, as sf.deploy does
    image = torch.rand(3, *config.size, generator=torch.Generator().manual_seed(0)).to(device)
    with Console(stderr=True).status("building") as status:
        info = _info(config)
        report = measure_latency(
            {name: _build(one, image) for name, one in _variants(info).items()},
            image,
            fuse=GIVEN,
            threads=config.threads,
            compiled=config.compile,
            seconds=config.seconds,
            name=info.backbone,
            progress=status.update,
        )
    files = [] if config.output is None else report.write(config.output)
    return Outcome(data=asdict(report), shown=[report.table()], files=files)


def _info(config: Namespace) -> DetectorInfo:
    """What to build, with the options' switches."""
    from slabformer._detector import DetectorConfig
    from slabformer.tasks.detection.saved import DetectorInfo, load_detector

    if is_file(config.model):
        _, info = load_detector(config.model)
    else:
        info = DetectorInfo(backbone=config.model, detector=DetectorConfig(), class_names=[], category_ids=[])
    detector = info.detector
    if config.sampling_ratio is not None:
        detector = replace(detector, roi_sampling_ratio=config.sampling_ratio)
    switches = {} if config.output_norm is None else {"output_norm": config.output_norm}
    return replace(info, detector=detector, backbone_args=info.backbone_args | switches)


def _variants(info: DetectorInfo) -> dict[str, DetectorInfo]:
    """What to time, the baseline that speed-ups are over first."""
    import torch

    from slabformer.models.detection.backbones import create_backbone

    def baseline(**arguments: str) -> DetectorInfo:
        return replace(info, backbone_args=info.backbone_args | {"norm": "layernorm"} | arguments)

    named = {} if info.backbone_args.get("output_norm") in (None, "none") else {"output_norm": "layernorm"}
    with torch.device("meta"):
        attention = getattr(create_backbone(info.backbone, **info.backbone_args).body, "attention", "")
    softmax = {SOFTMAX: baseline(attention="S" * len(attention), **named)} if "L" in attention else {}
    return softmax | {LAYERNORM: baseline(**named), GIVEN: info}


def _build(info: DetectorInfo, image: Tensor) -> Detector:
    import torch

    from slabformer.bench.detector import as_if_trained_

    torch.manual_seed(0)
    return as_if_trained_(info.build().to(image.device), image)
