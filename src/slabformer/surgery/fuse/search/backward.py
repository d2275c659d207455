"""What the input of a norm is made of, and what each of that must take over for the norm to go.

The input is followed upstream, through operations with a rule, to where its elements start: Linears and Convs, tables
of embeddings, parameters, and sums, whose operands are followed in turn. Of ``a + b`` both take over the scale, and one
of them the shift: ``(a + b) * scale + shift = (a * scale + shift) + b * scale``.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from slabformer.surgery.fuse.consumers import writer_at
from slabformer.surgery.fuse.graph.flow import (
    End,
    downstream,
    is_written,
    needs_fill,
    operands_of,
    origin,
    pair,
    passes_upstream,
    repeats_memory,
    upstream,
)
from slabformer.surgery.fuse.graph.parts import name_of
from slabformer.surgery.fuse.graph.rules import channel_labels
from slabformer.surgery.fuse.graph.trace import LAYER, NORM, PAD, Trace, describe
from slabformer.surgery.fuse.search.neighbours import Neighbours
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.plan import SCALES, Role, Target, scale_of
from slabformer.surgery.fuse.tree.sharing import display
from slabformer.surgery.reasons import Reason, RefusalError, Why

#: targets, and the operation at which each has a part in the input
Taken = list[tuple[Target, Node]]


@dataclass(frozen=True)
class Wanted:
    """What a norm wants of a tensor that is read on the way to it.

    Attributes:
        labels: The channel of the norm that each element becomes.
        factor: The number that they are multiplied by from there on.
    """

    labels: Tensor
    factor: float = 1.0


@dataclass(frozen=True)
class Match:
    """How the channels of something become channels of a norm.

    Attributes:
        axis: Where they lie.
        index: Channel of the norm that each of them becomes, -1 for none.
        factor: The number that they are multiplied by on the way.
    """

    axis: int
    index: Tensor
    factor: float


class Sources:
    """All that tensors are made of in one trace, and what each of that must take over.

    Args:
        known: About the model.
        trace: The graph.
        wanted: What is wanted of each tensor, by the operation that reads it.
        roles: What is to be taken over for each of the tensors.

    Raises:
        RefusalError: If something has a part in one that cannot take the norm over, or that something else reads.
    """

    def __init__(
        self,
        known: Neighbours,
        trace: Trace,
        wanted: Mapping[tuple[Node, Node], Wanted],
        roles: Mapping[Node, Role],
    ) -> None:
        self.known, self.trace = known, trace
        self._roles, self._wanted = roles, dict(wanted)
        self._behind: dict[Node, list[Node]] = {}
        self._between: set[Node] = set()
        self._matches: dict[tuple[Node, Role], Match] = {}
        self._ways: dict[tuple[Node, Role], list[Taken | RefusalError]] = {}
        self._follow_upstream()

    @classmethod
    def of_norm(cls, known: Neighbours, norm: Norm, trace: Trace) -> Sources:
        """What the input of ``norm`` is made of, to take the norm over."""
        calls: list[Any] = trace.calls.get(norm.index, [])
        if any(is_written(call) and repeats_memory(call.args[0]) for call in calls):
            raise RefusalError(
                Reason.IN_PLACE, "its output is changed in place, and elements of its input lie in one place"
            )
        wanted = {(call, call.args[0]): Wanted(channel_labels(call, norm.channel_dim)) for call in calls}
        return cls(known, trace, wanted, dict.fromkeys((call.args[0] for call in calls), "map"))

    @classmethod
    def of_joins(cls, known: Neighbours, joins: Sequence[End], trace: Trace) -> Sources:
        """What joins a norm's output in sums, to be divided by the scale and to take the shift over."""
        roles: dict[Node, Role] = {}
        for end in joins:
            role: Role = "carry" if end.shifted else "unscale"
            if roles.setdefault(end.source, role) != role:
                raise RefusalError(Reason.SEVERAL_PARTS, f"{describe(end.source)} joins it in several sums")
        return cls(known, trace, {(e.node, e.source): Wanted(e.labels, 1 / e.factor) for e in joins}, roles)

    def targets(self) -> Taken:
        """What must change, and the operation at which it has a part in a tensor."""
        taken = _together([self._taken(tensor, role) for tensor, role in self._roles.items()])
        return sorted(taken, key=lambda item: self.trace.order[item[1]])

    def _follow_upstream(self) -> None:
        """Find everything, the last operation first: what is wanted of a sum is known before its operands are met."""
        queue: list[tuple[int, Node]] = []
        tensors = list(self._roles)
        while tensors or queue:
            for tensor in tensors:
                for start in self._starts(tensor):
                    heapq.heappush(queue, (-self.trace.order[start], start))
            tensors = []
            _, start = heapq.heappop(queue)
            if operands_of(start) and (start, operands_of(start)[0]) not in self._wanted:
                tensors = self._want_operands(start)

    def _starts(self, tensor: Node) -> list[Node]:
        """Where the elements of ``tensor`` start, and the pads that they pass."""
        if tensor in self._behind:
            return []
        fills: list[Node] = []

        def sources_of(node: Node) -> list[Node] | None:
            if self._is_start(node):
                return None
            if not passes_upstream(node, self.known.gone):
                code, words = origin(node, self.trace)
                raise RefusalError(code, f"its input comes from {words}")
            if needs_fill(node, self.known.fixed_size):
                fills.append(node)
            first = node.args[0]
            return [part for part in (first if isinstance(first, (list, tuple)) else [first]) if isinstance(part, Node)]

        found, passed = upstream(tensor, sources_of)
        self._between.update(passed)
        found += fills
        self._behind[tensor] = sorted(found, key=self.trace.order.__getitem__)
        return self._behind[tensor]

    def _is_start(self, node: Node) -> bool:
        is_layer = node.target is LAYER or writer_at(node) is not None or self._is_norm_of_join(node)
        return is_layer or node in self.trace.names or bool(operands_of(node))

    def _is_norm_of_join(self, node: Node) -> bool:
        """Whether it is a norm that stays, whose map may take over what a join must."""
        is_there = node.target is NORM and node.args[1] not in self.known.gone
        return is_there and not {"carry", "unscale"}.isdisjoint(self._roles.values())

    def _want_operands(self, total: Node) -> list[Node]:
        match = self._match(total, "scale")
        back = match.axis - total.meta["val"].ndim
        for operand in operands_of(total):
            shape = operand.meta["val"].shape
            if len(shape) < -back or shape[back] != len(match.index):
                words = f"what {describe(total)} in front of it adds is broadcast over its channels"
                raise RefusalError(Reason.BROADCAST, words)
            self._wanted[total, operand] = Wanted(_laid_out(match.index, operand, back), match.factor)
        return operands_of(total)

    def _taken(self, tensor: Node, role: Role) -> Taken:
        """What everything behind ``tensor`` must take over for it to have ``role`` of the norm's map."""
        starts = self._behind[tensor]
        return _together([self._by_sum(s, role) if operands_of(s) else [(self._target(s, role), s)] for s in starts])

    def _by_sum(self, total: Node, role: Role) -> Taken:
        """The same for a sum: of all ways, the one that needs fewest new biases."""
        if (total, role) not in self._ways:
            self._ways[total, role] = list(self._tried(total, role))
        ways = [way for way in self._ways[total, role] if not isinstance(way, RefusalError)]
        if not ways:
            raise self._ways[total, role][0]  # type: ignore[misc]
        return min(ways, key=_num_new_biases)

    def _tried(self, total: Node, role: Role) -> Iterator[Taken | RefusalError]:
        """What must change where one operand has ``role`` and the others the scale, for each of them, or why not."""
        operands = operands_of(total)
        for one in operands[:1] if role in SCALES else operands:
            try:
                self._match(total, role)
                yield _together([self._taken(other, role if other is one else scale_of(role)) for other in operands])
            except RefusalError as error:
                yield error

    def _target(self, start: Node, role: Role) -> Target:
        if start in self.trace.names:
            self.known.need_free(start, self.trace)
        match, site = self._match(start, role), writer_at(start)
        if start.target is PAD:
            target = self.known.at_pad(start, match.index, role, "previous")
        elif start.target is LAYER:
            target = self.known.at_layer(start, match.index, role, "previous")
        elif start.target is NORM:
            target = self.known.at_norm(start, _laid_out(match.index, start, match.axis), role, "previous")
        elif site is not None:
            target = self.known.at_site(site, match.index, self.trace, role, "previous")
        else:
            target = self.known.at_tensor(start, match.axis, match.index, self.trace, role)
        return target if role in SCALES else replace(target, factor=1 / match.factor)

    def _match(self, start: Node, role: Role) -> Match:
        """How the channels of ``start`` become the norm's."""
        if (start, role) not in self._matches:
            self._matches[start, role] = self._matched(start, role)
        return self._matches[start, role]

    def _matched(self, start: Node, role: Role) -> Match:
        """The same; labels must pass all operations between: one that refuses them hides channels from the norm."""
        axis, index, ends = self._reached(start, role)
        factors = {end.factor * self._wanted[end.node, end.source].factor for end in ends if self._is_wanted(end)}
        for end in ends:
            if self._is_wanted(end) or (end.node.target is PAD and end.refusal is None):
                continue
            if end.node in self._between:
                assert end.refusal is not None
                codes, words = end.refusal.codes, f"seen from {self._name(start)}, {end.refusal.words}"
                raise RefusalError.of(Why(codes, words))
            others = end.labels[end.labels >= 0].unique().long()
            if bool((index[others] >= 0).any()):
                subject = self._name(start) if start in self.trace.names else f"the output of {self._name(start)}"
                raise RefusalError(Reason.SHARED_OUTPUT, f"{subject} also feeds {describe(end.node)}")
        if role not in SCALES and len(factors) > 1:
            words = f"{self._name(start)} is multiplied by several numbers in front of it"
            raise RefusalError(Reason.SEVERAL_FACTORS, words)
        return Match(axis, index, min(factors, default=1.0))

    def _reached(self, start: Node, role: Role) -> tuple[int, Tensor, list[End]]:
        """The axis along which the channels of ``start`` lie, what they become, and all that they reach."""
        best, known = None, self.known
        for axis in self._axes(start):
            seeds = {start: channel_labels(start, axis)}
            ends = downstream(self.trace, seeds, known.gone, known.fixed_size, scale_only=role in SCALES, scaled=True)
            met = [(end.labels, self._wanted[end.node, end.source].labels) for end in ends if self._is_wanted(end)]
            index = pair(met, seeds[start].numel())
            if index is not None and (best is None or bool((index >= 0).any())):
                best = axis, index, ends
                if bool((index >= 0).any()):
                    break
        if best is None:
            words = f"an output channel of {self._name(start)} meets several of its channels"
            raise RefusalError(Reason.CHANNELS_MIXED, words)
        return best

    def _axes(self, start: Node) -> Sequence[int]:
        ndim, site = start.meta["val"].ndim, writer_at(start)
        if site is not None:
            return [ndim + site.axis]
        if start.target is NORM:
            return [range(ndim)[self.known.norms[start.args[1]].channel_dim]]  # type: ignore[index]
        if start.target is LAYER:
            return [ndim + self.known.layer_axis(start, "previous")[0]]
        return [ndim - 1] if start.target is PAD else range(ndim)[::-1]

    def _is_wanted(self, end: End) -> bool:
        return (end.node, end.source) in self._wanted

    def _name(self, start: Node) -> str:
        site, trace = writer_at(start), self.trace
        if start in trace.names:
            return display(trace.names[start])
        if start.target is NORM:
            return self.known.norms[start.args[1]].name  # type: ignore[index]
        if start.target is LAYER:
            return self.known.layers[start.args[-1]].name  # type: ignore[index]
        if site is not None:
            return name_of(site, trace)
        return "a pad" if start.target is PAD else f"{describe(start)} in front of it"


def _laid_out(index: Tensor, tensor: Node, axis: int) -> Tensor:
    """``index`` as labels of ``tensor``, whose channels lie along ``axis``."""
    return index.to(torch.int32)[channel_labels(tensor, axis).long()]


def _together(groups: Sequence[Taken]) -> Taken:
    """All of ``groups``, once; what has a part in several must have the same role in each."""
    roles: dict[str, Role] = {}
    found = {(target.name, node): target for group in groups for target, node in group}
    for target, _ in (item for group in groups for item in group):
        if roles.setdefault(target.name, target.role) != target.role:
            raise RefusalError(Reason.SEVERAL_PARTS, f"{target.name} has several parts in the sum in front of it")
    return [(target, node) for (_, node), target in found.items()]


def _num_new_biases(taken: Taken) -> int:
    return sum(target.new_bias and target.role not in SCALES for target, _ in taken)
