"""What every use of PyTorch's exporters needs around it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from slabformer._process import alone, no_logs


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter's own log lines about registries, opsets and missing GPUs are not for our users."""
    names = ("torch.onnx", "torch.fx", "torch.export", "torch.utils.cpp_extension", "onnxscript", "onnx_ir")
    with alone, no_logs(*names, below=logging.ERROR):
        yield
