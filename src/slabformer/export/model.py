"""Write a model for other runtimes: ONNX or torch.export's own format, any batch size, checked against PyTorch.

export(deployed, images, Path("model.onnx"))       # ExportResult(path, max_rel, batch_sizes, ...)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from slabformer._defaults import RUNTIME_RTOL, Format
from slabformer._files import replaced
from slabformer.export.norms_left import norms_in, onnx_operators
from slabformer.export.onnx_file import drawn, program_of, write_onnx
from slabformer.export.program import Program, onnx_run
from slabformer.export.signature import AsWritten, Inputs, Signature, flatten
from slabformer.measure.equality import Runtime
from slabformer.settings import IrVersion, NonNegativeFloat, Opset, PositiveInt, checked
from slabformer.surgery.verify import verify


@dataclass(frozen=True)
class ExportResult:
    """A file that computes what the model does.

    Attributes:
        path: The file.
        batch_sizes: What was compared.
        max_abs: Largest absolute difference to PyTorch over all of them.
        max_rel: The same over the root mean square of PyTorch's outputs.
        norms: Operators in an ONNX file that normalise, by kind, with how many are left.
    """

    path: Path
    batch_sizes: tuple[int, ...]
    max_abs: float
    max_rel: float
    norms: Mapping[str, int] = field(default_factory=dict)


@checked
def export(
    model: nn.Module,
    example: Inputs,
    path: str | Path,
    *,
    format: Format = "onnx",
    batch_sizes: Sequence[PositiveInt] = (1, 2, 7),
    rtol: NonNegativeFloat = RUNTIME_RTOL,
    metadata: Mapping[str, str] | None = None,
    opset: Opset | None = None,
    ir_version: IrVersion | None = None,
) -> ExportResult:
    """Export ``model`` with a dynamic batch axis, and compare the file with it at several batch sizes.

    Args:
        model: In eval mode, on a CPU, taking tensors and returning tensors in any container.
        example: A batch ``(B, ...)``, a tuple of positional arguments or a mapping of keyword arguments; other batch
            sizes are drawn like it. Inputs whose first axis is not ``B`` keep their shape.
        path: To write. The file appears when it has passed; until then what was there stays.
        format: "onnx", run by onnxruntime; or "pt2", for ``torch.export.load`` and AOTInductor.
        batch_sizes: Compared with PyTorch.
        rtol: Largest difference that passes, relative to the output's scale.
        metadata: Strings to keep in an ONNX file's header.
        opset: Version of ONNX's operators; PyTorch's choice by default.
        ir_version: Version of the ONNX format, for runtimes that are older than the exporter.

    Raises:
        VerificationError: If the file computes something else.
        ValueError: If ``model`` is in train mode, ``format`` is unknown, or ONNX options are given for another format.
        UnsupportedError: If ``model`` cannot be exported; names the operator or the line.
        OSError: If ``path`` cannot be written.
    """
    if format != "onnx" and (opset is not None or ir_version is not None):
        raise ValueError(f"opset and ir_version are ONNX's; leave them out for {format}")
    if model.training:
        raise ValueError("export needs eval mode, got a model in train mode; call model.eval() first")
    signature, flat = flatten(model, example)
    norms: Mapping[str, int] = {}
    with replaced(Path(path)) as temporary:
        if format == "onnx":
            program = program_of(flat, signature, example)
            write_onnx(program, signature, temporary, opset=opset, ir_version=ir_version, metadata=metadata)
            reference: nn.Module = AsWritten(model, signature)
            run: nn.Module = Program(signature, onnx_run(temporary))
            norms = norms_in(onnx_operators(temporary))
        else:
            reference, run = model, _export_pt2(model, signature, example, temporary)
        generator = torch.Generator().manual_seed(0)
        cases = [drawn(example, signature, n, generator) for n in batch_sizes]
        result = verify(reference, run, cases, rtol=rtol, lazy=True)
    return ExportResult(Path(path), tuple(batch_sizes), result.max_abs, result.max_rel, norms)


def _export_pt2(model: nn.Module, signature: Signature, example: Inputs, path: Path) -> nn.Module:
    program = program_of(model, signature, example)
    with io.BytesIO() as file:  # torch's writer ends the process where a disk is full
        torch.export.save(program, file)
        path.write_bytes(file.getbuffer())
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return Runtime(module.forward)  # an exported module refuses eval(), which verify calls
