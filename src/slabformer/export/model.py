"""Write a model for other runtimes: ONNX or torch.export's own format, any batch size, checked against PyTorch.

export(deployed, images, Path("model.onnx"))       # ExportResult(path, max_rel, batch_sizes, ...)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from slabformer._defaults import RUNTIME_RTOL, Format
from slabformer._extras import require
from slabformer._files import replaced
from slabformer._process import alone, no_logs
from slabformer.measure.equality import Runtime
from slabformer.surgery.verify import verify

INPUT, OUTPUT = "images", "logits"


@dataclass(frozen=True)
class ExportResult:
    """A file that computes what the model does.

    Attributes:
        path: The file.
        batch_sizes: What was compared.
        max_abs: Largest absolute difference to PyTorch over all of them.
        max_rel: The same over the root mean square of PyTorch's outputs.
    """

    path: Path
    batch_sizes: tuple[int, ...]
    max_abs: float
    max_rel: float


def export(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    format: Format = "onnx",
    batch_sizes: Sequence[int] = (1, 2, 7),
    rtol: float = RUNTIME_RTOL,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Export ``model`` with a dynamic batch axis, and compare the file with it at several batch sizes.

    Args:
        model: In eval mode, on a CPU, taking one tensor and returning one.
        example: A batch ``(B, ...)``; other batch sizes are drawn like it.
        path: To write. The file appears when it has passed; until then what was there stays.
        format: "onnx", run by onnxruntime; or "pt2", for ``torch.export.load`` and AOTInductor.
        batch_sizes: Compared with PyTorch.
        rtol: Largest difference that passes, relative to the output's scale.
        metadata: Strings to keep in an ONNX file's header.

    Raises:
        VerificationError: If the file computes something else.
        ValueError: If ``model`` is in train mode, or ``format`` is unknown.
        RuntimeError: If ``model`` cannot be exported.
        OSError: If ``path`` cannot be written.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    if model.training:
        raise ValueError("export needs eval mode, got a model in train mode; call model.eval() first")
    pair = example[:1].expand(2, *example.shape[1:]).contiguous()  # a batch of 1 would be taken for a constant
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with replaced(Path(path)) as temporary, torch.no_grad(), quiet_exporter():
        if format == "onnx":
            run = _export_onnx(model, pair, temporary, shapes, metadata or {})
        else:
            run = _export_pt2(model, pair, temporary, shapes)
        generator = torch.Generator().manual_seed(0)
        cases = [torch.randn(n, *example.shape[1:], generator=generator).to(example) for n in batch_sizes]
        result = verify(model, Runtime(run), cases, rtol=rtol, lazy=True)
    return ExportResult(Path(path), tuple(batch_sizes), result.max_abs, result.max_rel)


def _export_onnx(
    model: nn.Module, example: Tensor, path: Path, shapes: Any, metadata: Mapping[str, str]
) -> Callable[[Tensor], Tensor]:
    require("onnxscript", extra="export")
    runtime = require("onnxruntime", extra="export")
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(str(path), external_data=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)

    return run


def _export_pt2(model: nn.Module, example: Tensor, path: Path, shapes: Any) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    with path.open("wb") as file:
        torch.export.save(program, file)
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda images: module(images)  # an exported module refuses eval(), which verify calls


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter's own log lines about registries and opsets are not for our users."""
    with alone, no_logs("torch.onnx", "onnxscript", "onnx_ir", below=logging.ERROR):
        yield
