"""Defaults that functions share with their options, which are shown before anything heavy is imported."""

from __future__ import annotations

from typing import Literal

#: largest difference of outputs relative to their scale: of one function computed in another order ...
RTOL = 1e-5
#: ... and by a compiler or another runtime; a wrong graph differs by far more
RUNTIME_RTOL = 1e-3
#: largest distance of a box's edge: of a fused detector, and of one in another runtime
PIXELS, RUNTIME_PIXELS = 1e-3, 0.05
#: boxes that enter the last suppression of an exported detector
MAX_CANDIDATES = 4096
#: of exported models
Format = Literal["onnx", "pt2"]
#: batches that an audit reads; each norm's own loss takes a forward of all of them
AUDIT_BATCHES = 8
