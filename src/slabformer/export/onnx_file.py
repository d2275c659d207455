"""A model's call as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

from slabformer._extras import require
from slabformer._torch import compile_error, tree_leaves
from slabformer.export.exporter import quiet_exporter
from slabformer.export.refusals import unsupported
from slabformer.export.signature import BATCH, FlatCall, Inputs, Port, Signature, in_order, like

#: the first whose RoIAlign and GridSample are those of PyTorch
DETECTION_OPSET = 20


def program_of(model: nn.Module, signature: Signature, inputs: Inputs) -> torch.export.ExportedProgram:
    """``model`` as torch.export's program, the axes that ``signature`` names of any length.

    Args:
        model: In eval mode; a :class:`FlatCall` takes ``inputs`` in order, any other module as they are.
        signature: Of its call.
        inputs: As for :func:`flatten`.

    Raises:
        UnsupportedError: If PyTorch cannot export it; names the operator or the line.
    """
    dims: dict[str, Any] = {}
    shapes: Any = [
        {axis: dims.setdefault(name, torch.export.Dim(name, min=1)) for axis, name in port.axes().items()}
        for port in signature.inputs
    ]
    tensors = [two_long(tensor, port) for port, tensor in zip(signature.inputs, in_order(inputs), strict=True)]
    args, kwargs = tuple(tensors), {}
    if isinstance(model, FlatCall):
        shapes = (tuple(shapes),)
    elif signature.keywords:
        names = [port.name for port in signature.inputs]
        args, kwargs, shapes = (), dict(zip(names, tensors, strict=True)), dict(zip(names, shapes, strict=True))
    with torch.no_grad(), quiet_exporter():
        try:
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            except compile_error() as error:
                narrower = _narrowed(error, shapes)
                return torch.export.export(model, args, kwargs, dynamic_shapes=narrower, strict=False)
        except Exception as error:  # a model's forward may raise anything
            raise unsupported("torch.export", error) from error


def _narrowed(error: Exception, shapes: Any) -> Any:
    """``shapes`` with the lengths that a model's tables allow, such as those of its positions.

    Raises:
        Exception: ``error``, where it is about something else, or an axis may have one length alone.
    """
    try:
        narrower = refine_dynamic_shapes_from_suggested_fixes(getattr(error, "msg", ""), shapes)
    except Exception:  # PyTorch's own, where there is no suggestion
        raise error from None
    if any(isinstance(dim, int) for dim in tree_leaves(narrower)):
        raise error
    return narrower


def two_long(tensor: Tensor, port: Port) -> Tensor:
    """``tensor``, its axes of any length at least 2 long: 1 would be taken for a constant."""
    for axis, name in port.axes().items():
        if tensor.shape[axis] == 1 or name == BATCH:
            tensor = tensor.narrow(axis, 0, 1).repeat_interleave(2, axis)
    return tensor


def drawn(inputs: Inputs, signature: Signature, batch_size: int, generator: torch.Generator) -> Any:
    """``inputs`` of another batch size: floating point ones of random numbers, others of their own rows."""

    def another(port: Port, tensor: Tensor) -> Tensor:
        if BATCH not in port.shape:
            return tensor
        if tensor.is_floating_point():
            return torch.randn(batch_size, *tensor.shape[1:], generator=generator).to(tensor)
        return tensor[torch.randint(len(tensor), (batch_size,), generator=generator)]

    tensors = [another(port, tensor) for port, tensor in zip(signature.inputs, in_order(inputs), strict=True)]
    return like(inputs, tensors)


def write_onnx(
    program: torch.export.ExportedProgram,
    signature: Signature,
    path: Path,
    *,
    opset: int | None = None,
    ir_version: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``program`` to ``path`` as ONNX, of PyTorch's opset or, where it detects objects, of 20 at least.

    Raises:
        UnsupportedError: If an operator has no counterpart; names it and the line that it comes from.
        ImportError: If onnxscript is missing; names the extra.
    """
    require("onnxscript", extra="export")
    # with gradients, attention would be taken apart as another kernel, whose output has other strides than in `program`
    with torch.no_grad(), quiet_exporter():
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[port.name for port in signature.inputs],
                output_names=[port.name for port in signature.outputs],
                opset_version=opset or (DETECTION_OPSET if _detects(program) else None),
                verbose=False,
            )
        except Exception as error:  # whatever a translation raises
            raise unsupported("ONNX", error, program) from error
    assert written is not None
    _keep_names_apart(written.model.graph)
    _name_axes(written.model.graph, signature)
    if ir_version is not None:
        written.model.ir_version = ir_version
    written.model.metadata_props.update(metadata or {})
    written.save(str(path), external_data=False)


def _detects(program: torch.export.ExportedProgram) -> bool:
    return any(str(node.target).startswith(("torchvision.", "aten.grid_sampler")) for node in program.graph.nodes)


def _name_axes(graph: Any, signature: Signature) -> None:
    """Call the axes of any length what ``signature`` calls them, where the exporter says "s21"."""
    ports = list(zip(graph.inputs, signature.inputs, strict=True))
    names = {str(value.shape[axis]): name for value, port in ports for axis, name in port.axes().items()}
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        for axis, size in enumerate(value.shape or ()):
            if str(size) in names:
                value.shape[axis] = names[str(size)]


def _keep_names_apart(graph: Any) -> None:
    """Rename what is called like an input or output: the exporter calls results after their operators, "embedding"."""
    ports = [*graph.inputs, *graph.outputs]
    taken = {value.name for value in ports}
    for value in [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]:
        if value.name in taken and not any(value is port for port in ports):
            value.name = f"{value.name}_inside"
