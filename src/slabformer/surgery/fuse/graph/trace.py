"""Trace a model into one flat graph in which every norm is one opaque call, and so are pads and registered modules."""

from __future__ import annotations

import dataclasses
import linecache
import operator
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from slabformer._process import alone, no_logs
from slabformer._torch import graph_sources, name_of_operator, schema_of
from slabformer.surgery.fuse.consumers import CONSTANT
from slabformer.surgery.fuse.tree.copies import WATCHED, Example, quiet
from slabformer.surgery.fuse.tree.norms import Layer, Norm, Pad, find_layers, find_pads, tail_of
from slabformer.surgery.outputs import first_line, tensors_of

#: subgraphs that wrap a region of the forward and change nothing about which tensor goes where
_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


@torch.library.custom_op("slabformer::norm", mutates_args=())
def mark_norm(x: Tensor, index: int) -> Tensor:
    """Stands for norm number ``index`` while tracing; never computed."""
    return x.clone()


@mark_norm.register_fake
def _(x: Tensor, index: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("slabformer::pad_tokens", mutates_args=())
def mark_pad(x: Tensor, pad_h: int, pad_w: int, index: int) -> Tensor:
    """Stands for pad number ``index`` while tracing, also where it pads by 0; never computed."""
    return torch.nn.functional.pad(x, (0, 0, 0, pad_w, 0, pad_h))


@mark_pad.register_fake
def _(x: Tensor, pad_h: int, pad_w: int, index: int) -> Tensor:
    B, H, W, C = x.shape
    return x.new_empty(B, H + pad_h, W + pad_w, C)


@torch.library.custom_op("slabformer::layer", mutates_args=())
def mark_layer(x: Tensor, others: Sequence[Tensor], output: Tensor, index: int) -> Tensor:
    """Stands for registered module number ``index`` and its ``output`` while tracing; never computed."""
    return output.clone()


@mark_layer.register_fake
def _(x: Tensor, others: Sequence[Tensor], output: Tensor, index: int) -> Tensor:
    return torch.empty_like(output)


NORM = torch.ops.slabformer.norm.default
PAD = torch.ops.slabformer.pad_tokens.default
LAYER = torch.ops.slabformer.layer.default


class Trace:
    """One traced forward.

    Attributes:
        graph: All operations in order, regions inlined.
        order: Position of each node.
        calls: The calls of each norm, by its index.
        pad_calls: The calls of each pad, by its index.
        layer_calls: The calls of each module that has a consumer of its own, by its index.
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
        self.layer_calls = _by_index(graph, LAYER)
        for node in graph.nodes:
            is_made = node.op != "placeholder" and all(source.meta[CONSTANT] for source in node.all_input_nodes)
            node.meta[CONSTANT] = is_made or node in self.names

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


def mark_(model: nn.Module, norms: Sequence[Norm], pads: Sequence[Pad], layers: Sequence[Layer]) -> None:
    """Let every norm, pad and registered module of ``model``, a copy, be one call of its mark, for good."""
    for norm in norms:
        module = model.get_submodule(norm.name)
        module.forward = _norm_call(norm.index, tail_of(module))  # type: ignore[assignment]
    for pad in pads:
        model.get_submodule(pad.name).forward = _pad_call(pad.index)  # type: ignore[assignment]
    for layer in layers:
        module = model.get_submodule(layer.name)
        module.forward = _layer_call(layer.index, module.forward)  # type: ignore[assignment]


def _norm_call(index: int, tail: nn.Module | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = torch.ops.slabformer.norm(x, index)
        return y if tail is None else tail(y)

    return forward


def _pad_call(index: int) -> Callable[[Tensor, int, int], Tensor]:
    def forward(x: Tensor, pad_h: int, pad_w: int) -> Tensor:
        return torch.ops.slabformer.pad_tokens(x, pad_h, pad_w, index)

    return forward


def _layer_call(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        x, *others = tensors_of((args, kwargs))
        if not isinstance(output, Tensor) or not args or args[0] is not x:
            return output  # not called as a layer is
        return torch.ops.slabformer.layer(x, others, output, index)

    return forward


def trace_model(model: nn.Module, norms: Sequence[Norm], example: Example) -> Trace:
    """Trace ``model``, a copy whose norms, pads and registered modules are replaced by marks for good.

    Raises:
        Exception: Whatever ``torch.export`` raises for a model it cannot trace.
    """
    mark_(model, norms, find_pads(model), find_layers(model))
    with alone, quiet(), _no_fast_path(), _no_sources(), no_logs("torch"):  # whole graphs, when an export fails
        program = torch.export.export(_TensorsOnly(model, example), example.args, dict(example.kwargs), strict=False)
    graph, signature = inline_regions(program.graph_module), program.graph_signature
    _close_layers_(graph)
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


def _close_layers_(graph: Graph) -> None:
    """Leave nothing of what registered modules compute: their outputs come from their marks."""
    for node in [node for node in graph.nodes if node.target is LAYER]:
        x, others, output, index = node.args
        node.args = (x, others, index)
        path, inside = _path(node), {output}
        while inside:
            made = inside.pop()
            if isinstance(made, Node) and made.op == "call_function" and path in paths(made) and not made.users:
                inside.update(made.all_input_nodes)
                graph.erase_node(made)


def paths(node: Node) -> Iterator[str]:
    """Names of the modules inside which ``node`` runs, outer ones first."""
    for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
        # a module that is called again is numbered
        yield path.partition("@")[0].removeprefix("model").removeprefix(".")


def _path(node: Node) -> str:
    return next(reversed(list(paths(node))), "")


def describe(node: Node) -> str:
    """An operation in words."""
    if node.op == "output":
        return "the model's output"
    if node.target is WATCHED:
        return str(node.args[1])
    name = schema_of(node.target)
    bare = name.name.split("::")[-1] if name is not None else getattr(node.target, "__name__", str(node.target))
    return f"{'an' if bare[0] in 'aeiou' else 'a'} {bare}"


def located(node: Node) -> str:
    """An operation in words, with the module that runs it."""
    path = _path(node)
    return f"{describe(node)} in {path}" if path else describe(node)


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
    if name_of_operator(node.target) not in _REGIONS:
        return None
    position = next(i for i, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr")
    holder: Any = node.args[position]
    return getattr(module, holder.target), [arg for arg in node.args[position + 1 :] if isinstance(arg, Node)]
