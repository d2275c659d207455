"""Trace a model into one flat graph in which every norm is one opaque call."""

from __future__ import annotations

import dataclasses
import linecache
import operator
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from slabformer._process import alone, no_logs
from slabformer._torch import graph_sources
from slabformer.surgery.fuse.graph.marks import NORM, PAD, mark_
from slabformer.surgery.fuse.tree.copies import Example, quiet
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.pads import find_pads
from slabformer.surgery.outputs import first_line, tensors_of

#: subgraphs that wrap a region of the forward and change nothing about which tensor goes where
_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}


_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


class Trace:
    """One traced forward.

    Attributes:
        graph: All operations in order, regions inlined.
        order: Position of each node.
        calls: The calls of each norm, by its index.
        pad_calls: The calls of each pad, by its index.
        parameters: Name of the parameter that a placeholder stands for; of tied ones, the first name.
        buffers: The same for buffers.
        names: Both.
        watched: Names of the modules inside which tensors were watched.
    """

    def __init__(
        self, graph: Graph, parameters: dict[Node, str], buffers: dict[Node, str], watched: Collection[str] = ()
    ) -> None:
        self.graph, self.watched = graph, watched
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.parameters, self.buffers, self.names = parameters, buffers, parameters | buffers
        self.calls = _by_index(graph, NORM)
        self.pad_calls = _by_index(graph, PAD)

    def sources(self, name: str) -> list[Node]:
        """The placeholders of a parameter or buffer."""
        return [node for node, own in self.names.items() if own == name]

    def users(self, name: str) -> list[Node]:
        """Every operation that reads a parameter or buffer."""
        return [user for node in self.sources(name) for user in node.users]


def _by_index(graph: Graph, mark: Any) -> dict[int, list[Node]]:
    """Calls of a mark, by the index that is its last argument."""
    calls: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.target is mark:
            calls.setdefault(node.args[-1], []).append(node)
    return calls


class _TensorsOnly(nn.Module):
    """Returns the tensors that a model is asked for, so that the tracer need not know their containers."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model, self.example = model, example

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_of(dataclasses.replace(self.example, args=args, kwargs=kwargs).outputs_of(self.model))


def trace(model: nn.Module, norms: Sequence[Norm], example: Example) -> Trace:
    """Trace ``model``, a twin whose norms and pads are replaced by marks for good.

    Raises:
        Exception: Whatever ``torch.export`` raises for a model it cannot trace.
    """
    mark_(model, norms, find_pads(model))
    with alone, quiet(), _no_fast_path(), _no_sources(), no_logs("torch"):  # whole graphs, when an export fails
        program = torch.export.export(_TensorsOnly(model, example), example.args, dict(example.kwargs), strict=False)
    graph, signature = inline_regions(program.graph_module), program.graph_signature
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    parameters, buffers = (
        {inputs[own]: name.removeprefix("model.") for own, name in given.items() if own in inputs}
        for given in (signature.inputs_to_parameters, signature.inputs_to_buffers)
    )
    first = {tensor: name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return Trace(
        graph,
        {node: first[model.get_parameter(name)] for node, name in parameters.items()},
        {node: first[model.get_buffer(name)] for node, name in buffers.items()},
        {item.name for item in example.watched},
    )


def why_untraceable(error: Exception) -> str:
    """The first line of what ``torch.export`` says, and the line of the model at which it gave up."""
    said = first_line(error)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((_TORCH, _HERE, "<")):
            return f"{said} At {Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    return said


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """``nn.MultiheadAttention`` as its plain operations."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _no_sources() -> Iterator[None]:
    """Without what torch.fx notes for good of every graph that it compiles: its source, here and in linecache."""
    sources = graph_sources()
    before = set(sources)
    try:
        yield
    finally:
        for name in sources.keys() - before:
            del sources[name]
            linecache.cache.pop(name, None)


def inline_regions(module: GraphModule) -> Graph:
    """The graph of ``module`` with no_grad and autocast regions, which are subgraphs, written out in place."""
    graph = Graph()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    env: dict[Node, Any] = {node: graph.node_copy(node) for node in inputs}
    graph.output(_copy_body(module, graph, env))
    return graph


def _copy_body(module: GraphModule, graph: Graph, env: dict[Node, Any]) -> Any:
    """Copy all but placeholders into ``graph``; returns what stands for the output."""

    def value(node: Node) -> Any:
        return env[node]

    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return torch.fx.map_arg(node.args[0], value)
        region = _region_of(module, node)
        if region is not None:
            submodule, operands = region
            inputs = [n for n in submodule.graph.nodes if n.op == "placeholder"]
            inner = {name: env[operand] for name, operand in zip(inputs, operands, strict=True)}
            env[node] = _copy_body(submodule, graph, inner)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], (tuple, list)):
            env[node] = env[node.args[0]][node.args[1]]  # one of the outputs of a region
        else:
            env[node] = graph.node_copy(node, value)
    raise AssertionError("a graph without output")


def _region_of(module: GraphModule, node: Node) -> tuple[GraphModule, list[Node]] | None:
    if getattr(node.target, "_name", None) not in _REGIONS:
        return None
    position = next(i for i, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr")
    holder: Any = node.args[position]
    return getattr(module, holder.target), [arg for arg in node.args[position + 1 :] if isinstance(arg, Node)]
