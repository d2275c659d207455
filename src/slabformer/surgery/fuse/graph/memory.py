"""Which tensors of a graph share memory, and where it is changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from slabformer.surgery.fuse.graph.flow import End
from slabformer.surgery.fuse.graph.marks import NORM, PAD
from slabformer.surgery.fuse.graph.trace import Trace

aten = torch.ops.aten
#: they return their input or a view of it, though their schemas do not say so; a norm once it is gone
_UNSAID = {
    *(NORM, PAD, aten.dropout.default, aten.feature_dropout.default),
    *(aten.type_as.default, aten._unsafe_view.default),
}


def written_between(trace: Trace, call: Node, ends: Iterable[End]) -> bool:
    """Whether the memory that ``call`` reads is changed in place after it and before its last reader in ``ends``.

    The norm's output is memory of its own; once the norm is gone, that of its input stands in for it.
    """
    last = max((trace.order[end.node] for end in ends), default=-1)
    writes = _writes_to(_base(call.args[0]))  # type: ignore[arg-type]
    return any(trace.order[call] < trace.order[write] < last for write in writes)


def is_written(node: Node) -> bool:
    """Whether the memory of ``node`` is changed in place anywhere."""
    return any(True for _ in _writes_to(node))


def repeats_memory(node: Node) -> bool:
    """Whether several elements of ``node`` lie in one place, norms in front of it taken as gone."""
    while not _overlaps(node):
        source = node.args[0] if _is_alias(node) and node.args else None
        # what overlaps behind no norm was copied, or an element of it chosen
        if not isinstance(source, Node) or (node.target is not NORM and _overlaps(source)):
            return False
        node = source
    return True


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


def _base(node: Node) -> Node:
    while _is_alias(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_alias(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function"  # getitem
    return node.target in _UNSAID or any(result.alias_info is not None for result in schema.returns)


def _writes(user: Node, node: Node) -> bool:
    schema = getattr(user.target, "_schema", None)
    arguments = zip(schema.arguments, user.args, strict=False) if schema is not None else ()
    return any(arg is node and spec.alias_info is not None and spec.alias_info.is_write for spec, arg in arguments)
