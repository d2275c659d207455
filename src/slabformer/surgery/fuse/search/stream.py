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

from slabformer.surgery.fuse.graph.flow import End, downstream, pair, words
from slabformer.surgery.fuse.graph.labels import describe, unread
from slabformer.surgery.fuse.graph.marks import NORM
from slabformer.surgery.fuse.graph.rules import FOLLOW
from slabformer.surgery.fuse.graph.sites import along, channel_labels, site_of
from slabformer.surgery.fuse.graph.trace import Trace
from slabformer.surgery.fuse.refusal import RefusalError
from slabformer.surgery.fuse.search.neighbours import Neighbours
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.plan import Part, Role, Target

aten = torch.ops.aten


def stream_targets(known: Neighbours, norm: Norm, call: Node, trace: Trace) -> Iterator[tuple[Target, Node]]:
    """Every neighbour that must move the stream in front of ``call``, and the operation at which it does.

    Raises:
        RefusalError: If something else has a part in the stream.
    """
    origin = _origin(known, call.args[0])
    labels = _labels_at(known, origin, call, channel_labels(call, norm.channel_dim), trace)
    yield from _supplied(known, origin, labels, trace, "add")
    for end in downstream(trace, {origin: labels}, known.gone, known.fixed_size):
        if end.node is not call:
            yield from _compensated(known, end, trace)


def _origin(known: Neighbours, node: Any) -> Node:
    """What ``node`` is a mere rearrangement of."""
    while FOLLOW.get(node.target, unread) is not unread or (node.target is NORM and node.args[1] in known.gone):
        sources = [source for source in node.all_input_nodes if source.meta["val"].is_floating_point()]
        if len(sources) != 1:
            raise RefusalError(f"the stream in front of it is put together by {describe(node)}")
        node = sources[0]
    return node


def _labels_at(known: Neighbours, origin: Node, sink: Node, wanted: Tensor, trace: Trace) -> Tensor:
    """Labels of ``origin`` that arrive at ``sink`` as ``wanted``."""
    for axis in range(origin.meta["val"].ndim):
        own = channel_labels(origin, axis)
        arrived = [e.labels for e in downstream(trace, {origin: own}, known.gone, known.fixed_size) if e.node is sink]
        index = pair([(labels, wanted) for labels in arrived], own.numel())
        whole = not any(bool(((labels < 0) & (wanted >= 0)).any()) for labels in arrived)
        if whole and index is not None and bool((index >= 0).any()):
            return index.to(torch.int32)[own.long()]
    raise RefusalError(f"its channels are spread over several axes of the output of {describe(origin)}")


def _supplied(known: Neighbours, node: Node, labels: Tensor, trace: Trace, role: Role) -> Iterator[tuple[Target, Node]]:
    """Neighbours in front of ``node`` that move it; whatever else reads ``node`` is not their concern."""
    site = site_of(node)
    if site is not None:
        yield known.at_site(site, along(labels, site.axis, site.num_out, site.words), trace, role, "previous"), node
    elif node.target is NORM:
        yield known.at_norm(node, labels, role, "previous"), node
    elif _is_sum(node):
        yield from _one_operand(known, node, node.all_input_nodes, labels, trace, role)
    else:
        raise RefusalError(f"the stream in front of it comes from {words(node, trace)}")


def _one_operand(
    known: Neighbours, total: Node, operands: list[Node], labels: Tensor, trace: Trace, role: Role
) -> Iterator[tuple[Target, Node]]:
    """Neighbours behind one of ``operands`` of an add that can move the sum, where nothing else reads that one."""
    reasons = []
    for operand in operands:
        try:
            yield from list(_behind(known, total, operand, labels, trace, role))
            return
        except RefusalError as error:
            reasons.append(str(error))
    raise RefusalError(reasons[0] if reasons else f"nothing is added to the stream by {describe(total)}")


def _behind(
    known: Neighbours, total: Node, operand: Node, labels: Tensor, trace: Trace, role: Role
) -> Iterator[tuple[Target, Node]]:
    if operand.meta["val"].shape != total.meta["val"].shape:
        raise RefusalError("what is added to the stream in front of it is broadcast")
    origin = _origin(known, operand)
    own = _labels_at(known, origin, total, labels, trace)
    _need_alone(known, origin, own, total, operand, trace)
    scaled = _scaled(known, origin, trace)
    if scaled is None:
        yield from _supplied(known, origin, own, trace, role)
        return
    source, gamma, leaf = scaled
    inner = _origin(known, source)
    site = site_of(inner)
    if site is None:
        raise RefusalError(f"what is added to the stream in front of it comes from {describe(inner)}, scaled")
    _need_alone(known, inner, _labels_at(known, inner, origin, own, trace), origin, source, trace)
    channels = channel_labels(inner, site.axis)
    arrived = _arriving(known, {inner: channels}, origin, source, trace)
    elements = torch.arange(leaf.meta["val"].numel(), dtype=torch.int32).view(leaf.meta["val"].shape)
    gains = _arriving(known, {leaf: elements}, origin, gamma, trace)
    rows = pair([(one, two) for one in arrived for two in gains], channels.numel())
    if rows is None or bool((rows < 0).any()):
        raise RefusalError(f"an output channel of {describe(inner)} is scaled in several ways")
    gain = Part(trace.parameters[leaf], 0, rows, torch.arange(channels.numel()))
    inner_labels = _labels_at(known, inner, origin, own, trace)
    for target, node in _supplied(known, inner, inner_labels, trace, role):
        yield replace(target, gain=gain), node


def _need_alone(known: Neighbours, node: Node, labels: Tensor, sink: Node, source: Node, trace: Trace) -> None:
    for end in downstream(trace, {node: labels}, known.gone, known.fixed_size):
        if end.node is not sink or end.source is not source:
            raise RefusalError(f"what is added to the stream in front of it also feeds {describe(end.node)}")


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
        raise RefusalError(f"the stream in front of it is read elsewhere, and there {end.refusal}")
    site = site_of(end.node)
    if end.node.target is NORM:
        yield known.at_norm(end.node, end.labels, "subtract", "next"), end.node
    elif site is not None and end.source is site.input and not site.padded:
        index = along(end.labels, site.axis, site.num_in, site.words)
        yield known.at_site(site, index, trace, "subtract", "next"), end.node
    elif _is_sum(end.node):
        others = [node for node in end.node.all_input_nodes if node is not end.source]
        yield from _one_operand(known, end.node, others, end.labels, trace, "subtract")
    else:
        raise RefusalError(f"the stream in front of it also feeds {describe(end.node)}")


def _is_sum(node: Node) -> bool:
    return node.target is aten.add.Tensor and bool(node.kwargs.get("alpha", 1) == 1)
