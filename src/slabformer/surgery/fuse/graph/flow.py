"""Follow labels downstream until something is not a rule; what can be followed upstream."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from slabformer.surgery.fuse.graph.labels import Call, Labels, describe, unread
from slabformer.surgery.fuse.graph.marks import NORM, PAD
from slabformer.surgery.fuse.graph.rules import CHECKS, FOLLOW, NUMBERS
from slabformer.surgery.fuse.graph.trace import Trace
from slabformer.surgery.fuse.refusal import RefusalError


@dataclass(frozen=True)
class End:
    """Where labels stop: an operation that no rule passes, or one whose rule refused. Pads that they pass, too.

    Attributes:
        node: The operation.
        source: The labelled tensor that it reads.
        labels: Of that tensor.
        refusal: The rule's reason, if there is a rule.
        factor: The number that the tensor was multiplied by on the way.
    """

    node: Node
    source: Node
    labels: Tensor
    refusal: str | None = None
    factor: float = 1.0


def downstream(
    trace: Trace,
    seeds: Mapping[Node, Tensor],
    gone: Collection[int],
    fixed_size: bool,
    scale_only: bool = False,
    scaled: bool = False,
) -> list[End]:
    """Everything that the labels of ``seeds`` reach, norms in ``gone`` taken as the identity.

    With ``scaled`` they pass products with a number, too, and quotients by one, unless it is 0.
    """
    labels: dict[Node, Labels] = dict(seeds)
    factors = dict.fromkeys(seeds, 1.0)
    queue: list[tuple[int, Node]] = []
    queued: set[Node] = set()

    def push(nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node not in queued:
                queued.add(node)
                heapq.heappush(queue, (trace.order[node], node))

    ends: list[End] = []
    for seed in seeds:
        push(seed.users)
    while queue:
        _, node = heapq.heappop(queue)
        refusal = None
        if node in seeds:
            pass
        elif node.target is NORM and node.args[1] in gone:
            labels[node], factors[node] = labels[node.args[0]], factors[node.args[0]]  # type: ignore[index]
        elif scaled and _is_multiple(node):
            labels[node] = labels[node.args[0]]  # type: ignore[index]
            factors[node] = factors[node.args[0]] * NUMBERS[node.target](node.args[1])  # type: ignore[index, arg-type]
        elif node.target in FOLLOW:
            try:
                factors[node] = _common(node, labels, factors)
                labels[node] = FOLLOW[node.target](Call(node, labels, fixed_size, scale_only))
            except RefusalError as error:
                refusal = str(error)
        passed = node in labels and node not in seeds
        if passed and _any(labels[node]):
            push(node.users)
        elif passed:
            del labels[node]
        if node.target not in CHECKS and (not passed or needs_fill(node, fixed_size)):
            for source in node.all_input_nodes:
                found = labels.get(source)
                if isinstance(found, Tensor):
                    ends.append(End(node, source, found, refusal, factors[source]))
    return ends


def _is_multiple(node: Node) -> bool:
    """Whether it is a product with a number, or a quotient by one, that is not 0."""
    return node.target in NUMBERS and isinstance(node.args[1], (int, float)) and node.args[1] != 0


def _common(node: Node, labels: Collection[Node], factors: Mapping[Node, float]) -> float:
    """The number by which all that ``node`` reads of the norm was multiplied."""
    found = {factors[source] for source in node.all_input_nodes if source in labels}
    if len(found) > 1:
        raise RefusalError(f"its output is multiplied by several numbers in front of {describe(node)}")
    return found.pop()


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


def words(node: Node, trace: Trace) -> str:
    """What a tensor comes from."""
    if node.op == "placeholder":
        return "a parameter" if node in trace.names else "the model's own inputs"
    return "another norm" if node.target is NORM else describe(node)
