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
from slabformer.deployment.export import export
from slabformer.nn import PRepBN, RepBN

EXTRA = "int8"
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
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISION}
        if threads is not None:
            options |= {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1"}
        self.request = core.compile_model(self.graph, "CPU", options).create_infer_request()
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output."""
        (output,) = self.request.infer({0: x.detach().cpu().contiguous().numpy()}).values()
        return torch.from_numpy(output.copy())

    def save(self, path: Path) -> list[Path]:
        """Write ``path`` (``.xml``) and the weights beside it (``.bin``), the graph last: it is there when all is."""
        openvino = require("openvino", extra=EXTRA)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            openvino.save_model(self.graph, str(Path(folder) / path.name), compress_to_fp16=False)
            files = [path.with_suffix(".bin"), path]
            for file in files:
                (Path(folder) / file.name).replace(file)
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
    if any(isinstance(module, (PRepBN, RepBN)) for module in model.modules()):
        raise ValueError("quantize needs a fused model, whose norms are gone; call slabformer.fuse first")
    arrays = [batch.detach().cpu().numpy() for batch in batches]
    if not arrays:
        raise ValueError("quantize needs at least one batch to see the ranges of activations")
    nncf = require("nncf", extra=EXTRA)
    advanced = require("nncf.quantization.advanced_parameters", extra=EXTRA)
    parameters = advanced.AdvancedQuantizationParameters(
        # by channel the CPU plugin knows activations on the first axis alone, where depthwise branches have them last
        activations_quantization_params=advanced.QuantizationParameters(per_channel=False),
        # smoothing the inputs of Linears takes a trained digits model from 98 % to 25 %
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=-1),
    )
    graph = to_openvino(model, torch.from_numpy(arrays[0][:1])).graph
    with _quiet(nncf):
        quantized = nncf.quantize(
            graph,
            nncf.Dataset(arrays),
            subset_size=len(arrays),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
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
