"""An ONNX file in 8-bit integers, its roundings written as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slabformer._extras import require
from slabformer.quantize.calibration import quantized


def quantize_onnx(path: Path, data: Sequence[Mapping[str, Any]]) -> None:
    """Replace the ONNX file at ``path`` by the same in integers.

    Args:
        path: In float32; it is read whole.
        data: Batches of arrays by the names of the inputs, which show the ranges of activations.
    """
    onnx = require("onnx", extra="export")
    onnx.save(quantized(onnx.load(str(path)), data, ignored=()), str(path))
