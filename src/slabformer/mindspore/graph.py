"""Trace a model into calls of its modules: what each of them runs, in order, with the modules in it as calls again."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, Node

from slabformer._process import alone, no_logs
from slabformer._torch import schema_of
from slabformer.mindspore.leaves import row_of
from slabformer.surgery.fuse.graph.trace import inline_regions, why_untraceable
from slabformer.surgery.fuse.tree.copies import deployed_copy, quiet

aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)
#: what the tracer inserts to hold shapes and dtypes to those of the example
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


@torch.library.custom_op("slabformer::mindspore_cell", mutates_args=())
def mark_cell(inputs: Sequence[Tensor], output: Tensor, name: str) -> Tensor:
    """Stands for the module ``name``, which becomes a cell, and its ``output`` while tracing; never computed."""
    return output.clone()


@mark_cell.register_fake
def _(inputs: Sequence[Tensor], output: Tensor, name: str) -> Tensor:
    return torch.empty_like(output)


CELL = torch.ops.slabformer.mindspore_cell.default


class ConversionError(ValueError):
    """A model that cannot be written for MindSpore, and why, in one line."""


@dataclass
class Call:
    """One run of a module.

    Attributes:
        path: Name of the module; empty for the model.
        items: Operations and calls of the modules inside it, in order.
    """

    path: str
    items: list[Node | Call] = field(default_factory=list)

    def nodes(self) -> Iterator[Node]:
        """Every operation, those of inner calls too."""
        for item in self.items:
            if isinstance(item, Call):
                yield from item.nodes()
            else:
                yield item


@dataclass(frozen=True)
class Traced:
    """A model as a tree of calls.

    Attributes:
        model: The copy that was traced, in eval mode.
        root: The call of the model.
        inputs: Its tensors' placeholders.
        outputs: What it returns.
        tensors: Placeholder of a parameter or buffer -> its name; of tied ones, the first name.
        constants: Name -> value of tensors that are in no state dict: buffers that are not saved, literals.
        batch: The symbol of the batch size; None where the graph holds for the example's alone.
    """

    model: nn.Module
    root: Call
    inputs: list[Node]
    outputs: list[Node]
    tensors: Mapping[Node, str]
    constants: Mapping[str, Tensor]
    batch: Any


def trace(model: nn.Module, inputs: Sequence[Tensor]) -> Traced:
    """The calls of ``model`` in eval mode on ``inputs``, whose first axis is the batch.

    Raises:
        ConversionError: If ``torch.export`` cannot take the model, or it returns something that is no tensor.
    """
    copied = deployed_copy(model).eval()
    for name, module in copied.named_modules():
        row = row_of(module) if name else None
        if row is not None:
            module.forward = _marked(name, None if row.keeps_shape else module.forward)  # type: ignore[assignment]
    program = _export(copied, tuple(map(_of_several, inputs)))
    graph = inline_regions(program.graph_module)
    _clean_(graph)
    given, tensors, constants = _inputs(graph, program, copied)
    (output,) = (node for node in graph.nodes if node.op == "output")
    outputs: Any = output.args[0] if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    if not outputs or not all(isinstance(one, Node) for one in outputs):
        raise ConversionError(
            f"{type(model).__name__} must return tensors and nothing else to be written for MindSpore"
        )
    sizes = [node.meta["val"].shape[0] for node in given if node.meta["val"].ndim]
    batch = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    return Traced(copied, _calls(graph, copied), given, list(outputs), tensors, constants, batch)


def _inputs(
    graph: Graph, program: torch.export.ExportedProgram, model: nn.Module
) -> tuple[list[Node], dict[Node, str], dict[str, Tensor]]:
    """What the placeholders of the graph are: the model's inputs, its tensors by name, and constants."""
    held = dict(_tensors_of(model))
    first: dict[int, str] = {}
    for name, tensor in held.items():
        first.setdefault(id(tensor), name)
    saved = model.state_dict()
    inputs, tensors, constants = [], {}, {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.target is None:
            inputs.append(node)
        elif spec.target in held:
            tensors[node] = first[id(held[spec.target])]
            if tensors[node] not in saved and node.users:
                constants[tensors[node]] = held[spec.target].detach()
        else:
            tensors[node] = re.sub(r"\W", "_", spec.target)
            constants[tensors[node]] = program.constants[spec.target]
    return inputs, tensors, constants


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _of_several(x: Tensor) -> Tensor:
    """``x`` with a batch of 2 at least: the tracer takes a batch of 1 for a constant."""
    return torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x


def _marked(name: str, own: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """A forward that is one call of the mark; ``own`` says of what shape the output is, by default the input's."""

    def forward(x: Tensor) -> Tensor:
        return torch.ops.slabformer.mindspore_cell([x], x if own is None else own(x), name)

    return forward


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    size = inputs[0].shape[0] if inputs[0].ndim else None
    free = tuple({0: Dim.AUTO} if x.ndim and x.shape[0] == size else None for x in inputs)
    with alone, quiet(), no_logs("torch"):
        try:
            return torch.export.export(model, inputs, dynamic_shapes=free, strict=False)
        except Exception as error:
            said = why_untraceable(error)
            raise ConversionError(f"torch.export cannot take {type(model).__name__}: {said}") from error


def _clean_(graph: Graph) -> None:
    """Take out checks, arithmetic on sizes, and what nothing reads; cells stand for what their modules compute."""
    for node in reversed(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target is CELL:
            inputs, _, name = node.args
            node.args = (inputs, name)
        elif _writes(node):
            _use_functional_(node, order)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _writes(node: Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def _use_functional_(node: Node, order: Mapping[Node, int]) -> None:
    """Let an operator that writes to its operand return a new tensor, where nothing reads the operand after it.

    Raises:
        ConversionError: Where something does.
    """
    schema = schema_of(node.target)
    packet = getattr(aten, schema.name.partition("::")[2].removesuffix("_"), None)
    functional: Any = getattr(packet, schema.overload_name or "default", None)
    written = node.args[0] if node.args else None
    while isinstance(written, Node):
        late = [user for user in written.users if order[user] > order[node]]
        if functional is None or late or written.op == "placeholder":
            raise refusal(node, "it writes to memory that is read again")
        written = written.args[0] if _is_view(written) else None
    node.target = functional


def _is_view(node: Node) -> bool:
    """Whether the result shares the memory of the first operand."""
    schema = schema_of(node.target)
    first = schema.arguments[0] if schema is not None and schema.arguments else None
    return first is not None and first.alias_info is not None and not schema.is_mutable


def is_tensor(node: Node) -> bool:
    """Whether ``node`` is a tensor or several; sizes are not."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value))


def is_list(module: nn.Module) -> bool:
    """Whether ``module`` only holds others, numbered from 0, and runs none of its own code but one after the other."""
    plain = type(module) in (nn.ModuleList, nn.Sequential)
    return plain and [name for name, _ in module.named_children()] == [str(i) for i in range(len(module))]  # type: ignore[arg-type]


def _calls(graph: Graph, model: nn.Module) -> Call:
    """The graph as a tree; a call is told from another one of the same module by its key."""
    root = Call("")
    opened: dict[tuple[str, ...], Call] = {(): root}
    last: tuple[str, ...] = ()
    closed: set[tuple[str, ...]] = set()  # whatever runs after another call has begun
    for node in graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        stack = _stack(node, model)
        keys = tuple(key for key, _ in stack)
        while last != keys[: len(last)]:
            closed.add(last)
            last = last[:-1]
        for depth in range(len(last), len(keys)):
            key = keys[: depth + 1]
            if key in closed:
                raise ConversionError(f"what {stack[depth][1]} runs is interleaved with what other modules run")
            opened[key] = Call(stack[depth][1])
            opened[keys[:depth]].items.append(opened[key])
        last = keys
        opened[keys].items.append(node)
    return root


def _stack(node: Node, model: nn.Module) -> list[tuple[str, str]]:
    """The calls inside which ``node`` runs, outer ones first: key, and path of the module; lists are left out."""
    found: list[tuple[str, str]] = []
    for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
        path = path.partition("@")[0]
        if path and not path.startswith("_empty") and not is_list(model.get_submodule(path)):
            found.append((key, path))
    if node.target is CELL:  # its own call is the cell's
        found = [(key, path) for key, path in found if path != node.args[1]]
    return found


def torch_line(node: Node) -> str:
    """The line of a model's code that ``node`` comes from: "model.py:14: x = fold(x)"; empty where none is known."""
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in frames if not file.startswith(_TORCH)] or [
        (file, int(line)) for file, line in frames
    ]
    if not own:
        return ""
    file, line = own[-1]
    return f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"


def operator_name(node: Node) -> str:
    """What torch calls an operation: "aten.roll.default"."""
    return str(node.target) if not isinstance(node.target, str) else node.target


def refusal(node: Node, reason: str) -> ConversionError:
    """What is said of an operation that cannot be written."""
    where = torch_line(node)
    return ConversionError(f"{operator_name(node)}: {reason}{f'; it comes from {where}' if where else ''}")
