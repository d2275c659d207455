"""ONNX Runtime: one ``model.onnx``, run on the CPU by onnxruntime alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slabformer._defaults import Precision
from slabformer.deployment.targets.base import Request, Target, Written, arrays_of
from slabformer.export.map_form import map_form
from slabformer.export.norms_left import norms_in, norms_in_words, onnx_operators
from slabformer.export.onnx_file import program_of, write_onnx
from slabformer.export.program import Run, onnx_run
from slabformer.export.signature import FlatCall
from slabformer.quantize.integer_form import integer_form
from slabformer.quantize.onnx_file import quantize_onnx

FILE = "model.onnx"


class OnnxRuntime(Target):
    """See :class:`Target`. In float16 the file is half as large; onnxruntime computes in float32 where it must."""

    name = "onnxruntime"
    packages = ("onnxruntime",)
    writers = ("onnxscript", "onnx")
    extra = "export"
    dtypes: Sequence[Precision] = ("float32", "float16", "int8")

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        path, signature = folder / FILE, request.signature
        write_onnx(program_of(_rewritten(request), signature, request.inputs), signature, path)
        if request.dtype == "int8":
            quantize_onnx(path, arrays_of(request.calibration, [port.name for port in signature.inputs]))
        left = norms_in(onnx_operators(path))
        return Written(did=f"an ONNX file, {norms_in_words(left)}")

    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """See :class:`Target`."""
        return onnx_run(folder / FILE, threads)

    def opening(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return """\
import functools, json, pathlib, sys, numpy, onnxruntime
run = functools.partial(onnxruntime.InferenceSession(pathlib.Path(__file__).with_name("model.onnx")).run, None)
"""


def _rewritten(request: Request) -> FlatCall:
    """The call of the model as onnxruntime likes it."""
    if request.dtype == "float16":
        return request.in_half()  # other forms of attention sum without a scale
    model = request.flat.model
    return request.flat.over(integer_form(model) if request.dtype == "int8" else map_form(model, normed=True))
