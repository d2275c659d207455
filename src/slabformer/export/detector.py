"""A detector as ONNX, checked against PyTorch on images, and such a file with the detector's own call.

export_detector(detector, images, Path("detector.onnx"), size=(800, 1333))     # the file appears when it has passed
OnnxDetector("detector.onnx")(image)["boxes"]                                  # as detector([image])[0]["boxes"]
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from slabformer._defaults import MAX_CANDIDATES, RUNTIME_PIXELS
from slabformer._extras import require
from slabformer._files import replaced
from slabformer.export.exporter import quiet_exporter
from slabformer.export.onnx_file import DETECTION_OPSET
from slabformer.export.static_detector import Size, StaticDetector, on_canvas
from slabformer.measure.detections import Detection, DetectionAgreement, agreement_of, agreement_over
from slabformer.models.detection.mask_rcnn import Detector
from slabformer.models.detection.paste import rescale_boxes
from slabformer.settings import Number, Pixels, check

INPUTS, OUTPUTS = ("image", "size"), ("boxes", "labels", "scores", "masks")
#: of the file's header: canvas and mean colour, beside what the caller puts there
CANVAS = "slabformer.canvas"


@dataclass(kw_only=True)
class _Canvas:
    """What the header says of the images."""

    size: tuple[Pixels, Pixels]
    mean: tuple[Number, Number, Number]


class OnnxDetector:
    """A file that :func:`export_detector` wrote, run by onnxruntime on a CPU.

    Args:
        path: The file.

    Attributes:
        metadata: Strings of the file's header, those given to :func:`export_detector` among them.
        size: Largest height and width of an image; larger ones are scaled down to it.

    Shape:
        An image ``(3, H, W)`` in [0, 1] to what ``detector([image])[0]`` returns: "boxes" in its pixels, "labels",
        "scores" and, if the detector has them, "masks".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of :func:`export_detector`.
        ImportError: If onnxruntime is missing; names the extra.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no detector at {str(path)!r}: no such file")
        runtime = require("onnxruntime", extra="export")
        try:
            self.session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own have no common class but this one
            raise ValueError(f"{path} is truncated, or no ONNX file ({str(error).splitlines()[0]})") from error
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        if CANVAS not in self.metadata:
            raise ValueError(f"{path} is no detector that `slab detect export` wrote")
        try:
            canvas = json.loads(self.metadata[CANVAS])
            check(CANVAS, canvas, _Canvas)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} describes its images in words that cannot be read: {error}") from error
        self.size: Size = (canvas["size"][0], canvas["size"][1])
        self._mean = torch.tensor(canvas["mean"]).view(3, 1, 1)
        self._outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, image: Tensor) -> Detection:
        """Detections of one image, best first."""
        given = (image.shape[1], image.shape[2])
        image = shrunk(image.float(), self.size)
        size = (image.shape[1], image.shape[2])
        canvas = on_canvas(image, self.size, self._mean)
        found = self.session.run(None, dict(zip(INPUTS, (canvas.numpy(), torch.tensor(size).numpy()), strict=True)))
        detection = without_padding(dict(zip(self._outputs, map(torch.from_numpy, found), strict=True)))
        return detection | {"boxes": rescale_boxes(detection["boxes"], size, given)}


@torch.no_grad()
def export_detector(
    detector: Detector,
    images: Iterable[Tensor],
    path: str | Path,
    *,
    size: Size,
    max_candidates: int = MAX_CANDIDATES,
    pixels: float = RUNTIME_PIXELS,
    metadata: Mapping[str, str] | None = None,
) -> DetectionAgreement:
    """Write ``detector`` as ONNX for images of up to ``size``, and compare the file with it.

    Args:
        detector: In eval mode, on a CPU, fused or not.
        images: ``(3, H, W)`` in [0, 1], to compare on; larger ones are scaled down.
        path: To write. The file appears when it has passed; until then what was there stays.
        size: Largest height and width; rounded up to multiples of 32.
        max_candidates: See :class:`StaticDetector`.
        pixels: Largest distance of a box's edge that passes.
        metadata: Strings to keep in the file's header.

    Raises:
        VerificationError: If the file detects something else.
        ValueError: If ``detector`` is in train mode, or there is no image.
        RuntimeError: If it cannot be exported.
        ImportError: If onnx or onnxruntime is missing; names the extra.
        OSError: If ``path`` cannot be written.
    """
    if detector.training:
        raise ValueError("export needs eval mode, got a detector in train mode; call detector.eval() first")
    require("onnxscript", extra="export")
    static = StaticDetector(detector, size, max_candidates)
    canvas = {"size": static.size, "mean": detector.config.image_mean}
    names = OUTPUTS if detector.roi_heads.has_mask() else OUTPUTS[:3]
    # attention as plain products: the exporter cannot follow the memory layout of fused kernels
    with quiet_exporter(), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")  # torch's and torchvision's, about their own internals
        program = torch.onnx.export(
            static,
            (static.mean.expand(3, *static.size).contiguous(), torch.tensor(static.size)),
            dynamo=True,
            opset_version=DETECTION_OPSET,
            input_names=list(INPUTS),
            output_names=list(names),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update({**(metadata or {}), CANVAS: json.dumps(canvas)})
    with replaced(Path(path)) as temporary:
        program.save(str(temporary), external_data=False)
        return _compare(detector, OnnxDetector(temporary), images, pixels)


def _compare(detector: Detector, exported: OnnxDetector, images: Iterable[Tensor], pixels: float) -> DetectionAgreement:
    agreements = []
    for i, image in enumerate(images):
        image = shrunk(image, exported.size)
        # a batch with a blank image of the canvas's size pads this one alike
        expected = detector([image, torch.zeros(3, *exported.size)])[0]
        agreements.append(agreement_of(expected, exported(image), f"image {i}"))
    return agreement_over(agreements, pixels)


def without_padding(detection: Detection) -> Detection:
    """Detections without those that are none, whose score is negative."""
    found = detection["scores"] >= 0
    return {name: value[found] for name, value in detection.items()}


def shrunk(image: Tensor, size: Size) -> Tensor:
    """``image`` scaled down, its ratio kept, where it is larger than ``size``."""
    factor = min(limit / side for limit, side in zip(size, image.shape[1:], strict=True))
    if factor >= 1:
        return image
    height, width = (max(1, int(side * factor)) for side in image.shape[1:])
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
