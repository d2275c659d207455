"""TensorRT: a ``model.onnx`` of operators that its parser takes, run on NVIDIA GPUs by onnxruntime-gpu.

Not run here: the file is held against the model by onnxruntime on the CPU, its operators against a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slabformer._defaults import Precision
from slabformer.deployment.targets.base import Request, Written
from slabformer.deployment.targets.onnx_runtime import FILE, OnnxRuntime
from slabformer.export.norms_left import onnx_operators
from slabformer.export.refusals import UnsupportedError

#: operators that the table of TensorRT's ONNX parser names as supported (onnx-tensorrt, docs/operators.md), without
#: those that it marks as experimental
TABLE = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu
Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual HardSigmoid Identity If InstanceNormalization IsNaN LRN LSTM LeakyRelu Less
LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean Min Mul Neg Not Or PRelu Pad Pow
QuantizeLinear RNN RandomUniform RandomUniformLike Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence Round Scan Scatter
ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split
Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where Xor
"""
SUPPORTED = frozenset(TABLE.split())


class TensorRt(OnnxRuntime):
    """See :class:`OnnxRuntime`. run.py asks onnxruntime-gpu for TensorRT; ``auto``, for CPUs, leaves it out."""

    name = "tensorrt"
    dtypes: Sequence[Precision] = ("float32", "float16")
    in_auto = False

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        written = super().write(request, folder)
        refused = sorted({each.kind for each in onnx_operators(folder / FILE)} - SUPPORTED)
        if refused:
            raise UnsupportedError(f"TensorRT's parser does not take {', '.join(refused)}; use onnxruntime")
        return Written(did=f"{written.did}, operators as TensorRT's parser takes them; not run on TensorRT here")

    def opening(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return """\
import functools, json, pathlib, sys, numpy, onnxruntime
path, providers = pathlib.Path(__file__).with_name("model.onnx"), ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
run = functools.partial(onnxruntime.InferenceSession(path, providers=providers).run, None)
"""
