"""Ranges of activations from data, and a graph in integers, by NNCF: for OpenVINO and for ONNX alike."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from slabformer._extras import require
from slabformer.export.openvino_run import EXTRA
from slabformer.export.signal_stack import signal_stack_kept
from slabformer.nn import PRepBN, RepBN
from slabformer.quantize.integer_form import integer_form
from slabformer.surgery.verify import verify


def calibrated_form(model: nn.Module, batches: Sequence[Tensor]) -> tuple[nn.Module, Tensor]:
    """``model`` as integer runtimes like it, verified, and an example of one image.

    Raises:
        ValueError: If ``model`` still holds RepBN or PRepBN, or there is no batch.
    """
    if any(isinstance(module, (PRepBN, RepBN)) for module in model.modules()):
        raise ValueError("quantize needs a fused model, whose norms are gone; call slabformer.fuse first")
    if not batches:
        raise ValueError("quantize needs at least one batch to see the ranges of activations")
    example = batches[0][:1].detach().cpu()
    form = integer_form(model)
    verify(model, form, example, lazy=True)
    return form, example


def quantized(graph: Any, data: Sequence[Any], ignored: Sequence[str] = ("GroupConvolution",)) -> Any:
    """``graph``, OpenVINO's or an ONNX model, in 8-bit integers: weights per channel, activations as ``data`` shows.

    Args:
        graph: In floating point.
        data: Batches as the format takes them.
        ignored: Kinds of operators that stay in floating point: signed activations make OpenVINO convolve depthwise in
            floats, and copy them there and back.
    """
    nncf = require("nncf", extra=EXTRA)
    advanced = require("nncf.quantization.advanced_parameters", extra=EXTRA)
    parameters = advanced.AdvancedQuantizationParameters(
        # smoothing the inputs of Linears takes a trained digits model from 98 % to 25 %
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=-1),
    )
    with _quiet(nncf), signal_stack_kept():
        return nncf.quantize(
            graph,
            nncf.Dataset(list(data)),
            subset_size=len(data),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(types=list(ignored), validate=False),
            advanced_parameters=parameters,
        )


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
