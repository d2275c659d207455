"""Fold a norm whose output is padded with zeros, by moving the residual stream in front of it.

``x * scale + shift = (x + shift / scale) * scale``. What follows takes over the scale, which leaves a zero a zero. The
Linear or Conv that last added to ``x`` adds ``shift / scale`` too, and whatever else reads ``x`` takes it away again:
the next Linear whose output is added to ``x``, or a Linear that reads it. The size of the padding does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from slabformer.surgery.fuse.consumers import writer_at
from slabformer.surgery.fuse.graph.flow import End, downstream, is_written, operands_of, origin, pair, upstream
from slabformer.surgery.fuse.graph.rules import FOLLOW, along, channel_labels, unread
from slabformer.surgery.fuse.graph.trace import LAYER, NORM, Trace, describe
from slabformer.surgery.fuse.search.neighbours import Neighbours
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.plan import Part, Role, Target
from slabformer.surgery.reasons import Reason, RefusalError, Why

aten = torch.ops.aten


def stream_targets(known: Neighbours, norm: Norm, call: Node, trace: Trace) -> Iterator[tuple[Target, Node]]:
    """Every neighbour that must move the stream in front of ``call``, and the operation at which it does.

    Raises:
        RefusalError: If something else has a part in the stream.
    """
    start = _origin(known, call.args[0])
    if is_written(start):
        raise RefusalError(Reason.IN_PLACE, "the stream in front of it is changed in place")
    labels = _labels_at(known, start, call, channel_labels(call, norm.channel_dim), trace)
    yield from _supplied(known, start, labels, trace, "add")
    for end in downstream(trace, {start: labels}, known.gone, known.fixed_size):
        if end.node is not call:
            yield from _compensated(known, end, trace)


def _origin(known: Neighbours, node: Any) -> Node:
    """What ``node`` is a mere rearrangement of."""

    def sources_of(current: Node) -> list[Node] | None:
        is_gone = current.target is NORM and current.args[1] in known.gone
        if FOLLOW.get(current.target, unread) is unread and not is_gone:
            return None
        sources = [source for source in current.all_input_nodes if source.meta["val"].is_floating_point()]
        if len(sources) != 1:
            words = f"the stream in front of it is put together by {describe(current)}"
            raise RefusalError(Reason.COMES_FROM_OPERATION, words)
        return sources

    (start,), _ = upstream(node, sources_of)
    return start


def _labels_at(known: Neighbours, start: Node, sink: Node, wanted: Tensor, trace: Trace) -> Tensor:
    """Labels of ``start`` that arrive at ``sink`` as ``wanted``."""
    for axis in range(start.meta["val"].ndim):
        own = channel_labels(start, axis)
        arrived = [e.labels for e in downstream(trace, {start: own}, known.gone, known.fixed_size) if e.node is sink]
        index = pair([(labels, wanted) for labels in arrived], own.numel())
        whole = not any(bool(((labels < 0) & (wanted >= 0)).any()) for labels in arrived)
        if whole and index is not None and bool((index >= 0).any()):
            return index.to(torch.int32)[own.long()]
    words = f"its channels are spread over several axes of the output of {describe(start)}"
    raise RefusalError(Reason.CHANNELS_SPREAD, words)


def _supplied(known: Neighbours, node: Node, labels: Tensor, trace: Trace, role: Role) -> Iterator[tuple[Target, Node]]:
    """Neighbours in front of ``node`` that move it; whatever else reads ``node`` is not their concern."""
    site = writer_at(node)
    if site is not None and site.input is not None:
        index = along(labels, site.axis, site.num_out, site.consumer.words)
        yield known.at_site(site, index, trace, role, "previous"), node
    elif node.target is LAYER:
        index = along(labels, *known.layer_axis(node, "previous"), "registered layer")
        yield known.at_layer(node, index, role, "previous"), node
    elif node.target is NORM:
        yield known.at_norm(node, labels, role, "previous"), node
    elif operands_of(node):
        yield from _one_operand(known, node, operands_of(node), labels, trace, role)
    else:
        code, words = origin(node, trace)
        raise RefusalError(code, f"the stream in front of it comes from {words}")


def _one_operand(
    known: Neighbours, total: Node, operands: list[Node], labels: Tensor, trace: Trace, role: Role
) -> Iterator[tuple[Target, Node]]:
    """Neighbours behind one of ``operands`` of an add that can move the sum, where nothing else reads that one."""
    refusals = []
    for operand in operands:
        try:
            yield from list(_behind(known, total, operand, labels, trace, role))
            return
        except RefusalError as error:
            refusals.append(error)
    raise refusals[0]


def _behind(
    known: Neighbours, total: Node, operand: Node, labels: Tensor, trace: Trace, role: Role
) -> Iterator[tuple[Target, Node]]:
    if operand.meta["val"].shape != total.meta["val"].shape:
        raise RefusalError(Reason.BROADCAST, "what is added to the stream in front of it is broadcast")
    start = _origin(known, operand)
    own = _labels_at(known, start, total, labels, trace)
    _need_alone(known, start, own, total, operand, trace)
    scaled = _scaled(known, start, trace)
    if scaled is None:
        yield from _supplied(known, start, own, trace, role)
        return
    source, gamma, leaf = scaled
    inner = _origin(known, source)
    site = writer_at(inner)
    if site is None or site.input is None:
        words = f"what is added to the stream in front of it comes from {describe(inner)}, scaled"
        raise RefusalError(Reason.COMES_FROM_OPERATION, words)
    _need_alone(known, inner, _labels_at(known, inner, start, own, trace), start, source, trace)
    channels = channel_labels(inner, site.axis)
    arrived = _arriving(known, {inner: channels}, start, source, trace)
    elements = torch.arange(leaf.meta["val"].numel(), dtype=torch.int32).view(leaf.meta["val"].shape)
    gains = _arriving(known, {leaf: elements}, start, gamma, trace)
    rows = pair([(one, two) for one in arrived for two in gains], channels.numel())
    if rows is None or bool((rows < 0).any()):
        raise RefusalError(Reason.SEVERAL_FACTORS, f"an output channel of {describe(inner)} is scaled in several ways")
    gain = Part(trace.parameters[leaf], 0, rows, torch.arange(channels.numel()))
    inner_labels = _labels_at(known, inner, start, own, trace)
    for target, node in _supplied(known, inner, inner_labels, trace, role):
        yield replace(target, gain=gain), node


def _need_alone(known: Neighbours, node: Node, labels: Tensor, sink: Node, source: Node, trace: Trace) -> None:
    for end in downstream(trace, {node: labels}, known.gone, known.fixed_size):
        if end.node is not sink or end.source is not source:
            words = f"what is added to the stream in front of it also feeds {describe(end.node)}"
            raise RefusalError(Reason.SHARED_OUTPUT, words)


def _arriving(known: Neighbours, seeds: dict[Node, Tensor], sink: Node, source: Node, trace: Trace) -> list[Tensor]:
    ends = downstream(trace, seeds, known.gone, known.fixed_size)
    return [end.labels for end in ends if end.node is sink and end.source is source]


def _scaled(known: Neighbours, node: Node, trace: Trace) -> tuple[Node, Node, Node] | None:
    """Of a product with a parameter (LayerScale): what is scaled, the factor, and the parameter; else None."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return None
    for scaled, gamma in (node.all_input_nodes, node.all_input_nodes[::-1]):
        leaf = _origin(known, gamma)
        if leaf in trace.parameters:
            return scaled, gamma, leaf
    return None


def _compensated(known: Neighbours, end: End, trace: Trace) -> Iterator[tuple[Target, Node]]:
    """Neighbours that take the move away from another reader of the stream."""
    if end.refusal is not None:
        words = f"the stream in front of it is read elsewhere, and there {end.refusal.words}"
        raise RefusalError.of(Why(end.refusal.codes, words))
    operands = operands_of(end.node)
    if operands:
        others = [node for node in operands if node is not end.source]
        yield from _one_operand(known, end.node, others, end.labels, trace, "subtract")
        return
    for target in known.readers(end, trace, "subtract", "the stream in front of it also feeds"):
        yield target, end.node
