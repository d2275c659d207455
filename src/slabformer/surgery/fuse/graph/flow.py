"""Follow channels through a graph: downstream by their labels, upstream to where they start, and through memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from slabformer._torch import schema_of
from slabformer.surgery.fuse.graph.rules import CHECKS, FOLLOW, NUMBERS, Call, Labels, unread
from slabformer.surgery.fuse.graph.trace import NORM, PAD, Trace, describe
from slabformer.surgery.reasons import Reason, RefusalError, Why

aten = torch.ops.aten
SUMS = {aten.add.Tensor, aten.add_.Tensor}
#: they return their input or a view of it, though their schemas do not say so; a norm once it is gone
_UNSAID_ALIASES = {
    *(NORM, PAD, aten.dropout.default, aten.feature_dropout.default),
    *(aten.type_as.default, aten._unsafe_view.default),
}


@dataclass(frozen=True)
class End:
    """Where labels stop: an operation that no rule passes, or one whose rule refused. Pads that they pass, too.

    Attributes:
        node: The operation.
        source: The labelled tensor that it reads; of a sum that labels pass, the other operand.
        labels: Of that tensor.
        refusal: The rule's reason, if there is a rule.
        factor: The number that the tensor was multiplied by on the way.
        shifted: Whether it has the shift of the map; False where it has the scale alone.
        joins: Whether ``node`` is a sum that labels pass, and ``source`` what joins them there.
    """

    node: Node
    source: Node
    labels: Tensor
    refusal: Why | None = None
    factor: float = 1.0
    shifted: bool = True
    joins: bool = False


def downstream(
    trace: Trace,
    seeds: Mapping[Node, Tensor],
    gone: Collection[int],
    fixed_size: bool,
    *,
    scale_only: bool = False,
    scaled: bool = False,
    through_sums: bool = False,
) -> list[End]:
    """Everything that the labels of ``seeds`` reach, norms in ``gone`` taken as the identity.

    Args:
        trace: The graph.
        seeds: Where to begin, and the labels there.
        gone: Norms that are the identity.
        fixed_size: Whether the graph is true for one input size only.
        scale_only: Whether the map has no shift.
        scaled: Pass products with a number, too, and quotients by one, unless it is 0.
        through_sums: Pass sums, too. What joins there is to be changed so that the sum has the scale and no shift.
    """
    return _Downstream(trace, seeds, gone, fixed_size, scale_only, scaled, through_sums).ends()


class _Downstream:
    def __init__(
        self,
        trace: Trace,
        seeds: Mapping[Node, Tensor],
        gone: Collection[int],
        fixed_size: bool,
        scale_only: bool,
        scaled: bool,
        through_sums: bool,
    ) -> None:
        self.trace, self.seeds, self.gone, self.fixed_size = trace, seeds, gone, fixed_size
        self.scaled, self.through_sums = scaled, through_sums
        self.labels: dict[Node, Labels] = dict(seeds)
        self.factors = dict.fromkeys(seeds, 1.0)
        self.shifted = dict.fromkeys(seeds, not scale_only)
        self.found: list[End] = []

    def ends(self) -> list[End]:
        queue: list[tuple[int, Node]] = []
        queued: set[Node] = set()

        def push(nodes: Iterable[Node]) -> None:
            for node in nodes:
                if node not in queued:
                    queued.add(node)
                    heapq.heappush(queue, (self.trace.order[node], node))

        for seed in self.seeds:
            push(seed.users)
        while queue:
            _, node = heapq.heappop(queue)
            refusal = None
            try:
                if node not in self.seeds:
                    self._pass(node)
            except RefusalError as error:
                refusal = error.why
            passed = node in self.labels and node not in self.seeds
            if passed and _any(self.labels[node]):
                push(node.users)
            elif passed:
                del self.labels[node]
            if node.target not in CHECKS and (not passed or needs_fill(node, self.fixed_size)):
                self.found += [
                    End(node, source, found, refusal, self.factors[source], self.shifted[source])
                    for source in node.all_input_nodes
                    if isinstance(found := self.labels.get(source), Tensor)
                ]
        return self.found

    def _pass(self, node: Node) -> None:
        """Label what comes out of ``node``, if labels pass it."""
        if node.target is NORM and node.args[1] in self.gone:
            self._label(node, self.labels[node.args[0]], node.args[0])  # type: ignore[index, arg-type]
        elif self.scaled and _is_multiple(node):
            by = NUMBERS[node.target](node.args[1])  # type: ignore[arg-type]
            self._label(node, self.labels[node.args[0]], node.args[0], by)  # type: ignore[index, arg-type]
        elif self.through_sums and operands_of(node):
            self._pass_sum(node)
        elif node.target in FOLLOW:
            source = self._common(node)
            call = Call(node, self.labels, self.fixed_size, scale_only=not self.shifted[source])
            self._label(node, FOLLOW[node.target](call), source)

    def _label(self, node: Node, labels: Labels, source: Node, by: float = 1.0) -> None:
        self.labels[node], self.factors[node] = labels, self.factors[source] * by
        self.shifted[node] = self.shifted[source]

    def _common(self, node: Node) -> Node:
        """What ``node`` reads of the norm, all of it with the same map."""
        sources = [source for source in node.all_input_nodes if source in self.labels]
        shifted = {self.shifted[source] for source in sources}
        if len(shifted) > 1:
            words = f"its output and a sum with it meet in {describe(node)}"
            raise RefusalError(Reason.SEVERAL_PARTS, words)
        if shifted == {True} and len({self.factors[source] for source in sources}) > 1:
            words = f"its output is multiplied by several numbers in front of {describe(node)}"
            raise RefusalError(Reason.SEVERAL_FACTORS, words)
        return sources[0]

    def _pass_sum(self, node: Node) -> None:
        size = node.meta["val"].ndim
        own = {tensor: self._aligned(tensor, size) for tensor in operands_of(node) if tensor in self.labels}
        one, *more = own
        if any(self.shifted[one] or self.shifted[other] or not torch.equal(own[one], own[other]) for other in more):
            raise RefusalError(Reason.SEVERAL_PARTS, f"both operands of {describe(node)} depend on it")
        self.found += [
            End(node, other, _operand_labels(own[one], other, node), None, self.factors[one], self.shifted[one], True)
            for other in operands_of(node)
            if other not in own
        ]
        self.labels[node], self.factors[node], self.shifted[node] = own[one], 1.0, False

    def _aligned(self, tensor: Node, size: int) -> Tensor:
        labels = self.labels[tensor]
        assert isinstance(labels, Tensor)
        return labels.view((1,) * (size - labels.ndim) + labels.shape)


def _operand_labels(labels: Tensor, operand: Node, total: Node) -> Tensor:
    """What ``labels`` of a sum say of an operand, which may be broadcast over other axes than the channels'."""
    shape = operand.meta["val"].shape
    beyond, own = labels.shape[: labels.ndim - len(shape)], labels.shape[labels.ndim - len(shape) :]
    if any(size > 1 for size in beyond) or any(one > size for one, size in zip(own, shape, strict=True)):
        words = f"what {describe(total)} behind it adds is broadcast over its channels"
        raise RefusalError(Reason.BROADCAST, words)
    return labels.view(own)


def _is_multiple(node: Node) -> bool:
    """Whether it is a product with a number, or a quotient by one, that is not 0."""
    return node.target in NUMBERS and isinstance(node.args[1], (int, float)) and node.args[1] != 0


def _any(labels: Labels) -> bool:
    return any(bool((item >= 0).any()) for item in ([labels] if isinstance(labels, Tensor) else labels))


def needs_fill(node: Node, fixed_size: bool) -> bool:
    """Whether it is a pad that needs another fill once a norm in front of it or behind it is gone."""
    return node.target is PAD and not (fixed_size and not any(node.args[1:3]))


def passes_upstream(node: Node, gone: Collection[int]) -> bool:
    """Whether what comes out of ``node`` is a rearrangement of its first argument, up to a number."""
    rule = FOLLOW.get(node.target, unread)
    return rule is not unread or _is_multiple(node) or (node.target is NORM and node.args[1] in gone)


def pair(sinks: list[tuple[Tensor, Tensor]], num_channels: int) -> Tensor | None:
    """For each channel that arrives somewhere, the one that is wanted there, -1 for none; None where ambiguous."""
    index, arrived = torch.full((num_channels,), -1), torch.zeros(num_channels, dtype=torch.bool)
    for labels, wanted in sinks:
        channel, want = (t.flatten().long() for t in torch.broadcast_tensors(labels, wanted))
        channel, want = channel[channel >= 0], want[channel >= 0]
        is_other = arrived[channel] & (index[channel] != want)
        index[channel], arrived[channel] = want, True
        if not torch.equal(index[channel], want) or bool(is_other.any()):
            return None
    return index


def upstream(node: Node, sources_of: Callable[[Node], Iterable[Node] | None]) -> tuple[list[Node], list[Node]]:
    """What ``node`` is made of.

    Args:
        node: Where to begin.
        sources_of: What a node is made of, to go on with; None where it is where elements start.

    Returns:
        Where the walk ended, and what it passed.
    """
    starts, passed = [], []
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        sources = sources_of(current)
        if sources is None:
            starts.append(current)
            continue
        passed.append(current)
        fresh = [source for source in dict.fromkeys(sources) if source not in seen]
        pending += fresh
        seen.update(fresh)
    return starts, passed


def operands_of(node: Node) -> list[Node]:
    """The two tensors that ``node`` is the sum of; [] if it is something else."""
    is_plain = node.target in SUMS and node.kwargs.get("alpha", 1) == 1
    return node.all_input_nodes if is_plain and len(node.all_input_nodes) == 2 else []


def origin(node: Node, trace: Trace) -> tuple[Reason, str]:
    """What a tensor that cannot be followed upstream comes from, as code and words."""
    if node.op == "placeholder":
        is_parameter = node in trace.names
        words = "a parameter" if is_parameter else "the model's own inputs"
        return Reason.COMES_FROM_OPERATION if is_parameter else Reason.COMES_FROM_INPUT, words
    if node.target is NORM:
        return Reason.COMES_FROM_NORM, "another norm"
    return Reason.COMES_FROM_OPERATION, describe(node)


# --- memory --------------------------------------------------------------------------------------------------------


def written_between(trace: Trace, call: Node, readers: Iterable[Node]) -> bool:
    """Whether the memory that ``call`` reads is changed in place after it and before the last of ``readers``.

    The norm's output is memory of its own; once the norm is gone, that of its input stands in for it.
    """
    last = max((trace.order[reader] for reader in readers), default=-1)
    (base,), _ = upstream(call.args[0], _aliased)  # type: ignore[arg-type]
    return any(trace.order[call] < trace.order[write] < last for write in _writes_to(base))


def is_written(node: Node) -> bool:
    """Whether the memory of ``node`` is changed in place anywhere."""
    return any(True for _ in _writes_to(node))


def repeats_memory(node: Node) -> bool:
    """Whether several elements of ``node`` lie in one place, norms in front of it taken as gone."""

    def sources_of(current: Node) -> list[Node] | None:
        sources = None if _overlaps(current) else _aliased(current)
        # what overlaps behind no norm was copied, or an element of it chosen
        return None if sources and current.target is not NORM and _overlaps(sources[0]) else sources

    (base,), _ = upstream(node, sources_of)
    return _overlaps(base)


def _overlaps(node: Node) -> bool:
    value: Any = node.meta.get("val")
    steps = zip(value.shape, value.stride(), strict=True) if isinstance(value, Tensor) else ()
    return any(size > 1 and not step for size, step in steps)


def _writes_to(node: Node) -> Iterator[Node]:
    """Operations that change the memory of ``node`` in place."""
    family, pending = set(), [node]
    while pending:
        member = pending.pop()
        if member in family:
            continue
        family.add(member)
        pending += [user for user in member.users if _is_alias(user)]
        yield from (user for user in member.users if _writes(user, member))


def _aliased(node: Node) -> list[Node] | None:
    """What ``node`` shares its memory with, or None where it has its own."""
    return [node.args[0]] if _is_alias(node) and node.args and isinstance(node.args[0], Node) else None


def _is_alias(node: Node) -> bool:
    schema = schema_of(node.target)
    if schema is None:
        return node.op == "call_function"  # getitem
    return node.target in _UNSAID_ALIASES or any(result.alias_info is not None for result in schema.returns)


def _writes(user: Node, node: Node) -> bool:
    schema = schema_of(user.target)
    arguments = zip(schema.arguments, user.args, strict=False) if schema is not None else ()
    return any(arg is node and spec.alias_info is not None and spec.alias_info.is_write for spec, arg in arguments)
