"""Follow labels downstream until something is not a rule, and upstream until a producer."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from slabformer.surgery.fuse.graph import Trace
from slabformer.surgery.fuse.labels import Call, Labels, RefusalError, describe, unread
from slabformer.surgery.fuse.marks import NORM, PAD
from slabformer.surgery.fuse.rules import CHECKS, FOLLOW, NUMBERS
from slabformer.surgery.fuse.sites import Site, site_of


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
        elif scaled and node.target in NUMBERS and isinstance(node.args[1], (int, float)) and node.args[1]:
            labels[node] = labels[node.args[0]]  # type: ignore[index]
            factors[node] = factors[node.args[0]] * NUMBERS[node.target](node.args[1])  # type: ignore[index]
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
        if node.target not in CHECKS and (not passed or _needs_fill(node, fixed_size)):
            for source in node.all_input_nodes:
                found = labels.get(source)
                if isinstance(found, Tensor):
                    ends.append(End(node, source, found, refusal, factors[source]))
    return ends


def _common(node: Node, labels: Collection[Node], factors: Mapping[Node, float]) -> float:
    """The number by which all that ``node`` reads of the norm was multiplied."""
    found = {factors[source] for source in node.all_input_nodes if source in labels}
    if len(found) > 1:
        raise RefusalError(f"its output is multiplied by several numbers in front of {describe(node)}")
    return found.pop()


def _any(labels: Labels) -> bool:
    return any(bool((item >= 0).any()) for item in ([labels] if isinstance(labels, Tensor) else labels))


def _needs_fill(node: Node, fixed_size: bool) -> bool:
    return node.target is PAD and not (fixed_size and not any(node.args[1:3]))


class Sources(NamedTuple):
    """What the input of a norm's call is made of.

    Attributes:
        sites: Linears and Convs.
        pads: Pads that need another fill once the norm is gone.
        between: All operations from the sites to the norm, pads included.
    """

    sites: list[Site]
    pads: list[Node]
    between: set[Node]


def producers(trace: Trace, call: Node, gone: Collection[int], fixed_size: bool) -> Sources:
    """What the input of a norm's ``call`` is made of by operations with a rule.

    Raises:
        RefusalError: If something else has a part in it.
    """
    found: dict[Node, Site] = {}
    pads: list[Node] = []
    pending: list[Any] = [call.args[0]]
    seen = set(pending)
    while pending:
        current = pending.pop()
        site = site_of(current)
        if site is not None:
            found[current] = site
            continue
        passes = FOLLOW.get(current.target, unread) is not unread or (
            current.target is NORM and current.args[1] in gone
        )
        if not passes:
            raise RefusalError(f"its input comes from {words(current)}")
        if _needs_fill(current, fixed_size):
            pads.append(current)
        first = current.args[0]
        parts = list(first) if isinstance(first, (list, tuple)) else [first]
        pending += [part for part in parts if isinstance(part, Node) and part not in seen]
        seen.update(pending)
    sites = [found[node] for node in sorted(found, key=trace.order.__getitem__)]
    return Sources(sites, pads, seen - found.keys())


def words(node: Node) -> str:
    """What a tensor comes from."""
    if node.op == "placeholder":
        return "the model's own inputs and parameters"
    return "another norm" if node.target is NORM else describe(node)


def written_between(trace: Trace, call: Node, ends: Iterable[End]) -> bool:
    """Whether the memory that ``call`` reads is changed in place after it and before its last reader in ``ends``.

    The norm's output is memory of its own; once the norm is gone, that of its input stands in for it.
    """
    last = max((trace.order[end.node] for end in ends), default=-1)
    family, pending = set(), [_base(call.args[0])]  # type: ignore[arg-type]
    while pending:
        node = pending.pop()
        if node in family:
            continue
        family.add(node)
        pending += [user for user in node.users if _is_alias(user)]
    writes = (user for node in family for user in node.users if _writes(user, node))
    return any(trace.order[call] < trace.order[write] < last for write in writes)


def _base(node: Node) -> Node:
    while _is_alias(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_alias(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function"  # getitem
    return node.target in (NORM, PAD) or any(result.alias_info is not None for result in schema.returns)


def _writes(user: Node, node: Node) -> bool:
    schema = getattr(user.target, "_schema", None)
    arguments = zip(schema.arguments, user.args, strict=False) if schema is not None else ()
    return any(arg is node and spec.alias_info is not None and spec.alias_info.is_write for spec, arg in arguments)
