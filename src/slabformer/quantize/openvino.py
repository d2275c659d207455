"""Integers end to end: a fused model through OpenVINO's static quantisation, since no norm asks for floats any more.

quantized = quantize(fused, calibration_batches)
quantized.save(Path("model.xml"))
logits = Int8Model(Path("model.xml"))(images)
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._extras import require
from slabformer._files import workspace
from slabformer.export.model import export
from slabformer.nn import PRepBN, RepBN
from slabformer.quantize.integer_form import integer_form
from slabformer.quantize.signal_stack import signal_stack_kept
from slabformer.surgery.verify import verify

EXTRA = "int8"
#: of what stays in floating point: OpenVINO would take bfloat16 where the processor has it
PRECISION = "f32"
#: batch sizes that a model stays compiled for, each with a copy of the weights
MAX_BATCH_SIZES = 4


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
        self.options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISION}
        if threads is not None:
            self.options |= {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1"}
        self.requests: dict[int, Any] = {}
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output; the first call with a batch size compiles for it."""
        (output,) = self._request(len(x)).infer({0: x.detach().cpu().contiguous().numpy()}).values()
        return torch.from_numpy(output.copy())

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

    def _request(self, batch_size: int) -> Any:
        """The graph for batches of one size: a quarter faster than for batches of any."""
        if batch_size not in self.requests:
            if len(self.requests) == MAX_BATCH_SIZES:
                self.requests.pop(next(iter(self.requests)))  # the oldest
            graph = self.graph.clone()
            shape = graph.inputs[0].partial_shape
            shape[0] = batch_size
            graph.reshape(shape)
            core = require("openvino", extra=EXTRA).Core()
            with signal_stack_kept():
                self.requests[batch_size] = core.compile_model(graph, "CPU", self.options).create_infer_request()
        return self.requests[batch_size]


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
    if any(isinstance(module, (PRepBN, RepBN)) for module in model.modules()):
        raise ValueError("quantize needs a fused model, whose norms are gone; call slabformer.fuse first")
    arrays = [batch.detach().cpu().numpy() for batch in batches]
    if not arrays:
        raise ValueError("quantize needs at least one batch to see the ranges of activations")
    nncf = require("nncf", extra=EXTRA)
    advanced = require("nncf.quantization.advanced_parameters", extra=EXTRA)
    parameters = advanced.AdvancedQuantizationParameters(
        # smoothing the inputs of Linears takes a trained digits model from 98 % to 25 %
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=-1),
    )
    example = torch.from_numpy(arrays[0][:1])
    form = integer_form(model)
    verify(model, form, example, lazy=True)
    graph = to_openvino(form, example).graph
    with _quiet(nncf), signal_stack_kept():
        quantized = nncf.quantize(
            graph,
            nncf.Dataset(arrays),
            subset_size=len(arrays),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            # signed activations make the plugin convolve depthwise in floats, and copy them there and back
            ignored_scope=nncf.IgnoredScope(types=["GroupConvolution"], validate=False),
            advanced_parameters=parameters,
        )
    return Int8Model(quantized, threads)


@contextmanager
def _quiet(nncf: ModuleType) -> Iterator[None]:
    """Its log lines are not for our users, and standard output is not for its progress bars."""
    logger = logging.getLogger("nncf")
    before = logger.level
    nncf.set_log_level(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        nncf.set_log_level(before)
