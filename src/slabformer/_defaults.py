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
#: of weights and arithmetic in a deployed model
Precision = Literal["float32", "bfloat16", "float16", "int8"]
#: what a deployed model runs on; "auto" is the fastest that is installed
TargetName = Literal["auto", "torch", "aoti", "openvino", "onnxruntime", "executorch", "tensorrt", "coreml"]
#: building and measuring, in all
DEPLOY_BUDGET = 900.0
