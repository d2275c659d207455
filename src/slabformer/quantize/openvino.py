"""Integers end to end: a fused model through OpenVINO's static quantisation, since no norm asks for floats any more.

quantized = quantize(fused, calibration_batches)
quantized.save(Path("model.xml"))
logits = Int8Model(Path("model.xml"))(images)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slabformer._extras import require
from slabformer._files import workspace
from slabformer.export.model import export
from slabformer.export.openvino_run import EXTRA, OpenVinoRun
from slabformer.quantize.calibration import calibrated_form, quantized

#: of what stays in floating point: OpenVINO would take bfloat16 where the processor has it
PRECISION = "f32"


class Int8Model(nn.Module):
    """A model that OpenVINO runs on the CPU, called with a batch of any size and returning its outputs.

    Args:
        source: An ``.xml`` file with its ``.bin`` beside it, or OpenVINO's own model.
        threads: That it computes with; OpenVINO's choice when None.

    Raises:
        FileNotFoundError: If a file is missing.
    """

    def __init__(self, source: Any, threads: int | None = None) -> None:
        super().__init__()
        if isinstance(source, Path) and not (source.is_file() and source.with_suffix(".bin").is_file()):
            raise FileNotFoundError(f"no model at {str(source)!r}: it takes the .xml file and the .bin beside it")
        core = require("openvino", extra=EXTRA).Core()
        self.graph = core.read_model(source) if isinstance(source, Path) else source
        self.run = OpenVinoRun(self.graph, PRECISION, threads)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output; the first call with a batch size compiles for it."""
        (output,) = self.run([x])
        return output

    def save(self, path: Path) -> list[Path]:
        """Write ``path`` (``.xml``) and the weights beside it (``.bin``), the graph last: it is there when all is."""
        openvino = require("openvino", extra=EXTRA)
        with workspace(path.parent) as folder:
            openvino.save_model(self.graph, str(folder / path.name), compress_to_fp16=False)
            files = [path.with_suffix(".bin"), path]
            path.unlink(missing_ok=True)  # it fits its own weights alone
            for file in files:
                (folder / file.name).replace(file)
        return files


def to_openvino(model: nn.Module, example: Tensor, threads: int | None = None) -> Int8Model:
    """``model``, in eval mode on a CPU, for OpenVINO in float32: what quantisation starts from and is held against.

    Raises:
        VerificationError: If the exported graph computes something else.
    """
    core = require("openvino", extra=EXTRA).Core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, example, path, batch_sizes=(1, 2))
        return Int8Model(core.read_model(path), threads)


def quantize(model: nn.Module, batches: Iterable[Tensor], threads: int | None = None) -> Int8Model:
    """``model`` in 8-bit integers: weights per channel, activations with the ranges that ``batches`` show.

    Args:
        model: Fused, in eval mode, on a CPU; models with a LayerNorm of their own go too, their norms stay in float.
        batches: Images ``(B, 3, H, W)`` as in deployment; a few hundred of the training set will do.
        threads: Of the result.

    Raises:
        ValueError: If ``model`` still holds RepBN or PRepBN, or there is no batch.
    """
    form, example = calibrated_form(model, batches := list(batches))
    graph = to_openvino(form, example).graph
    return Int8Model(quantized(graph, [batch.detach().cpu().numpy() for batch in batches]), threads)
