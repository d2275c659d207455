"""A file of another runtime, loaded: called as the model was that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._extras import require
from slabformer.export.refusals import unsupported
from slabformer.export.signature import Signature

#: tensors in order to tensors in order
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Program(nn.Module):
    """What a runtime computes, behind the model's own call.

    Args:
        signature: How it is called and what it returns.
        run: Tensors in order to tensors in order.

    Raises:
        TypeError: By a call with other inputs than the model's.
        ValueError: By a call with inputs of another shape or dtype.
    """

    def __init__(self, signature: Signature, run: Run) -> None:
        super().__init__()
        self.signature, self.run = signature, run
        self.train(False)

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's outputs."""
        return self.signature.arrange(self.run(self.signature.bind(inputs, named)))


def onnx_run(path: Path, threads: int | None = None) -> Run:
    """An ONNX file in onnxruntime on the CPU.

    Raises:
        UnsupportedError: If onnxruntime does not take it.
        ImportError: If onnxruntime is missing; names the extra.
    """
    runtime = require("onnxruntime", extra="export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # its warnings about constants are not for our users
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no common class but this one
        raise unsupported("onnxruntime", error) from error
    names = [given.name for given in session.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        arrays = (tensor.detach().contiguous().numpy() for tensor in tensors)
        return [torch.from_numpy(output) for output in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run
