"""How long does a detector take: backbone and end to end, LayerNorm, unfused and fused, in turns in one process.

    report = measure_latency({"LayerNorm": baseline, "PRepBN": detector}, image)
    console.print(report.table())

An equality comes before a speed: the fused detector must detect what the unfused one does, and a compiled backbone
compute what its eager form does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from slabformer._defaults import RUNTIME_RTOL
from slabformer._torch import compile_error, with_child
from slabformer.bench.detector_report import Latency, LatencyReport, Part
from slabformer.deployment.compiled import Compiled
from slabformer.deployment.detector import fuse_detector, verify_detections
from slabformer.deployment.native import natively
from slabformer.measure.rows import Mode
from slabformer.measure.timing import (
    Machine,
    count_parameters,
    mebibytes_of,
    num_threads,
    quantile,
    ratio,
    time_interleaved,
)
from slabformer.models.detection.mask_rcnn import Detector
from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.verify import verify
from slabformer.testing import randomize_norms_

logger = logging.getLogger(__name__)

#: of logits, so that a detector with random weights is sure enough of many boxes
SPREAD = 5.0
Key = tuple[str, Part, Mode]
Turns = dict[Key, list[list[float]]]


@torch.no_grad()
def measure_latency(
    variants: Mapping[str, Detector],
    image: Tensor,
    *,
    fuse: str,
    threads: int | None = None,
    compiled: bool = True,
    seconds: float = 30.0,
    name: str = "detector",
    progress: Callable[[str], None] = logger.debug,
) -> LatencyReport:
    """Time detectors on one image, and the fused form of one of them.

    Args:
        variants: By name, in eval mode on the image's device; speed-ups are over the first.
        image: ``(3, H, W)`` in [0, 1].
        fuse: Name of the variant that is fused, as "NAME fused".
        threads: torch's, on a CPU; all cores by default.
        compiled: Also with the backbone through ``torch.compile``; what follows depends on data and stays eager.
        seconds: Of measuring.
        name: What the report calls them.
        progress: Told what is being done.

    Raises:
        VerificationError: If the fused form detects something else, or a compiled backbone computes it.
        ValueError: If there is nothing to fuse.
    """
    notes: list[str] = []
    with num_threads(threads):
        machine = Machine.here(image.device)
        progress("fusing and comparing")
        fused, folds = fuse_detector(variants[fuse])
        fused, _ = natively(fused, image.device, notes)
        agreement = verify_detections(variants[fuse], fused, [image])
        notes.append(f"{folds.num_folded} of {len(folds)} norms folded")
        detectors = {**variants, f"{fuse} fused": fused}
        padded = next(iter(variants.values())).transform([image])[0].tensors
        calls, found = _calls(detectors, image, padded, compiled, notes, progress)
        progress(f"timing {len(calls)} forms")
        turns: Turns = time_interleaved(calls, seconds=seconds, device=image.device)
        order = sorted(calls, key=lambda key: (key[1], key[2] == "compiled"))
        first = next(iter(detectors))
        rows = [_row(key, detectors[key[0]], calls[key], turns, first, found[key[0]], image.device) for key in order]
    return LatencyReport(
        model=name,
        image_size=(image.shape[1], image.shape[2]),
        machine=machine,
        rows=rows,
        agreement=agreement,
        notes=notes,
    )


def _calls(
    detectors: Mapping[str, Detector],
    image: Tensor,
    padded: Tensor,
    compiled: bool,
    notes: list[str],
    progress: Callable[[str], None],
) -> tuple[dict[Key, Callable[[], object]], dict[str, int]]:
    """What to time, and how many objects each detector finds."""
    calls: dict[Key, Callable[[], object]] = {}
    found: dict[str, int] = {}
    for variant, detector in detectors.items():
        found[variant] = len(detector([image])[0]["labels"])
        calls[variant, "backbone", "eager"] = partial(detector.backbone, padded)
        calls[variant, "detector", "eager"] = partial(_detect, detector, image)
    for variant, detector in detectors.items() if compiled else ():
        progress(f"compiling the backbone of {variant}")
        program = Compiled(detector.backbone, image.device)
        try:
            program(padded)
        except compile_error() as error:
            notes.append(f"compiled forms left out, torch.compile failed: {str(error).strip().splitlines()[0]}")
            return {key: call for key, call in calls.items() if key[2] == "eager"}, found
        verify(detector.backbone, program, padded, rtol=RUNTIME_RTOL, lazy=True)
        calls[variant, "backbone", "compiled"] = partial(program, padded)
        calls[variant, "detector", "compiled"] = partial(_detect, with_child(detector, "backbone", program), image)
    return calls, found


def _detect(detector: Detector, image: Tensor) -> object:
    return detector([image])


def _row(
    key: Key,
    detector: Detector,
    call: Callable[[], object],
    turns: Turns,
    first: str,
    num_detections: int,
    device: torch.device,
) -> Latency:
    variant, part, mode = key
    return Latency(
        variant=variant,
        part=part,
        mode=mode,
        p50_ms=quantile(turns[key], 0.5) * 1e3,
        p90_ms=quantile(turns[key], 0.9) * 1e3,
        speed_up=ratio(turns[first, part, mode], turns[key]),
        memory_mib=mebibytes_of(call, device, times=3),
        parameters=count_parameters(detector.backbone if part == "backbone" else detector),
        num_detections=num_detections,
    )


@torch.no_grad()
def as_if_trained_(detector: Detector, image: Tensor, seed: int = 0) -> Detector:
    """Give a fresh detector norms that matter and scores that differ, so that it does the work of a trained one.

    Without this a detector finds nothing, and its mask head has nothing to do.

    Args:
        detector: Edited in place; in eval mode afterwards.
        image: ``(3, H, W)`` that scores are spread on.
        seed: Of the norms.
    """
    randomize_norms_(detector.backbone, seed)
    for norm in prepbn_modules(detector).values():
        norm.set_gamma(0.0)
    detector.eval()
    for layer in (detector.rpn.head.cls_logits, detector.roi_heads.box_predictor.cls_score):
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))  # noqa: B023 - removed below
        detector([image])
        handle.remove()
        spread = torch.cat([output.flatten() for output in outputs]).std()
        layer.weight.mul_(SPREAD / spread)
    return detector
