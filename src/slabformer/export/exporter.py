"""What every use of PyTorch's exporters needs around it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from slabformer._process import alone, no_logs


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter's own log lines about registries and opsets are not for our users."""
    with alone, no_logs("torch.onnx", "torch.fx", "torch.export", "onnxscript", "onnx_ir", below=logging.ERROR):
        yield
