"""OpenVINO: a graph ``model.xml`` with its weights ``model.bin``, run on the CPU by openvino alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slabformer._defaults import Precision
from slabformer._extras import require
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.export.map_form import map_form
from slabformer.export.norms_left import norms_in, norms_in_words, openvino_operators
from slabformer.export.onnx_file import program_of, write_onnx
from slabformer.export.openvino_run import EXTRA, OpenVinoRun
from slabformer.export.program import Run
from slabformer.export.refusals import unsupported
from slabformer.quantize.calibration import quantized
from slabformer.quantize.integer_form import integer_form

FILE = "model.xml"
#: dtype -> what OpenVINO calls the arithmetic
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f32", "int8": "f32"}


class OpenVino(Target):
    """See :class:`Target`. In bfloat16 the engine rounds, and the file stays; in float16 the file alone is halved."""

    name = "openvino"
    packages = ("openvino",)
    writers = ("onnxscript", "nncf")
    extra = EXTRA
    dtypes: Sequence[Precision] = ("float32", "bfloat16", "float16", "int8")

    def check_dtype(self, dtype: str) -> None:
        """See :class:`Target`; bfloat16 is the processor's matter."""
        super().check_dtype(dtype)
        core = require("openvino", extra=EXTRA).Core()
        if dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError(f"{self.name} has no bfloat16 on this processor; use float32, float16 or int8")

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        openvino, signature = require("openvino", extra=EXTRA), request.signature
        rewritten = integer_form if request.dtype == "int8" else map_form
        flat = request.flat.over(rewritten(request.flat.model))
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.onnx"
            write_onnx(program_of(flat, signature, request.inputs), signature, path)
            try:
                graph = openvino.Core().read_model(path)
            except RuntimeError as error:
                raise unsupported("OpenVINO", error) from error
        if request.dtype == "int8":
            data = [[tensor.detach().cpu().numpy() for tensor in tensors] for tensors in request.calibration]
            graph = quantized(graph, data if len(signature.inputs) > 1 else [tensors[0] for tensors in data])
        openvino.save_model(graph, str(folder / FILE), compress_to_fp16=request.dtype == "float16")
        left = norms_in(openvino_operators(graph))
        return Written(did=f"a graph, {norms_in_words(left)}")

    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """See :class:`Target`."""
        core = require("openvino", extra=EXTRA).Core()
        try:
            graph: Any = core.read_model(folder / FILE)
        except RuntimeError as error:
            raise unsupported("OpenVINO", error) from error
        return OpenVinoRun(graph, HINTS[dtype], threads)

    def opening(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return f"""\
import json, pathlib, sys, numpy, openvino
options = {{"INFERENCE_PRECISION_HINT": "{HINTS[dtype]}"}}
model = openvino.compile_model(pathlib.Path(__file__).with_name("model.xml"), "CPU", options)
run = lambda arrays: model(arrays).to_tuple()
"""
