"""An OpenVINO graph on the CPU, called with tensors in order; compiled for each batch size that comes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slabformer._extras import require
from slabformer.export.refusals import unsupported
from slabformer.export.signal_stack import signal_stack_kept

EXTRA = "int8"
#: batch sizes that a model stays compiled for, each with a copy of the weights
MAX_BATCH_SIZES = 4


class OpenVinoRun:
    """Tensors in order to tensors in order. Several threads may call it; each call waits for the one before.

    Args:
        graph: OpenVINO's own model.
        precision: Of arithmetic in floating point: "f32", "bf16" or "f16".
        threads: That it computes with; OpenVINO's choice when None.
    """

    def __init__(self, graph: Any, precision: str = "f32", threads: int | None = None) -> None:
        self.graph = graph
        self.options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        if threads is not None:
            self.options |= {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1"}
        self.requests: dict[int, Any] = {}
        self._lock = threading.Lock()  # a request holds the tensors of one call

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs; the first call with a batch size compiles for it."""
        arrays = {index: tensor.detach().cpu().contiguous().numpy() for index, tensor in enumerate(tensors)}
        with self._lock:
            outputs = self._request(tensors[0].shape[0]).infer(arrays)
            return [torch.from_numpy(outputs[index].copy()) for index in range(len(self.graph.outputs))]

    def _request(self, batch_size: int) -> Any:
        """The graph for batches of one size: a quarter faster than for batches of any."""
        if batch_size not in self.requests:
            if len(self.requests) == MAX_BATCH_SIZES:
                self.requests.pop(next(iter(self.requests)))  # the oldest
            graph = self.graph.clone()
            shapes = {each: each.partial_shape for each in graph.inputs}
            for shape in shapes.values():
                if len(shape) and shape[0].is_dynamic:
                    shape[0] = batch_size
            graph.reshape(shapes)
            core = require("openvino", extra=EXTRA).Core()
            try:
                with signal_stack_kept():
                    self.requests[batch_size] = core.compile_model(graph, "CPU", self.options).create_infer_request()
            except RuntimeError as error:
                raise unsupported("OpenVINO", error) from error
        return self.requests[batch_size]
