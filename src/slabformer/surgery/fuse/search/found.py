"""The neighbours that were found for one norm, and whether they work for it alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from slabformer.surgery.fuse.graph.flow import downstream
from slabformer.surgery.fuse.graph.labels import describe
from slabformer.surgery.fuse.graph.marks import NORM, PAD
from slabformer.surgery.fuse.graph.sites import EMBEDDING, channel_labels, readers_of_input
from slabformer.surgery.fuse.graph.trace import Trace
from slabformer.surgery.fuse.refusal import RefusalError
from slabformer.surgery.fuse.tree.owners import Owners
from slabformer.surgery.fuse.tree.plan import Part, Target


@dataclass
class _Entry:
    """A target and the operations, per trace, at which it was found."""

    target: Target
    nodes: dict[Trace, set[Node]]


class Found:
    """Targets by name, role and side."""

    def __init__(self, owners: Owners, traces: Sequence[Trace]) -> None:
        self.owners, self.traces = owners, traces
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, target: Target, trace: Trace, node: Node) -> None:
        """Note that ``target`` was found at ``node``."""
        entry = self._entries.setdefault(f"{target.name} {target.role} {target.side}", _Entry(target, {}))
        if not entry.target.agrees(target):
            raise RefusalError(f"{self._in_full(target)} is called on differently laid out channels")
        entry.nodes.setdefault(trace, set()).add(node)

    def exclusive(self) -> tuple[Target, ...]:
        """The targets.

        Raises:
            RefusalError: If one of them also works on something else.
        """
        for entry in self._entries.values():
            for trace in self.traces:
                self._need_exclusive(entry.target, trace, entry.nodes.get(trace, set()))
        return tuple(entry.target for entry in self._entries.values())

    def _need_exclusive(self, target: Target, trace: Trace, nodes: set[Node]) -> None:
        if target.norm is not None:
            users = trace.calls.get(target.norm, [])
        elif target.pad is not None:
            users = trace.pad_calls.get(target.pad, [])
        else:
            parts = [target.weight, target.values, *(() if target.new_bias else target.bias)]
            users = [user for part in parts if part is not None for user in _readers(part, trace, nodes)]
        for user in users:
            if user not in nodes:
                is_call = user.target in (NORM, PAD, EMBEDDING) or readers_of_input(user)
                use = "used on another input" if is_call else "read raw"
                raise RefusalError(f"{self._in_full(target)} is also {use} by {describe(user)}")

    def _in_full(self, target: Target) -> str:
        """A target that another call bars: its name, and what else it is called."""
        part = target.weight or target.values
        return target.name + ("" if part is None else self.owners.other_names(part.name))


def _readers(part: Part, trace: Trace, known: Collection[Node]) -> list[Node]:
    """What computes with these elements of a parameter, unless all that reads it is ``known``."""
    seeds = {}
    for source in trace.sources(part.name):
        if source in known:
            continue
        labels = channel_labels(source, part.axis)
        seeds[source] = labels.where(torch.isin(labels, part.rows), -1)
    return [end.node for end in downstream(trace, seeds, (), fixed_size=True)]
