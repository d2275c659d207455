"""Decide for every norm which neighbours take it over, or why none can."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from slabformer.surgery.fuse.graph.flow import End, downstream
from slabformer.surgery.fuse.graph.labels import describe
from slabformer.surgery.fuse.graph.marks import NORM, PAD
from slabformer.surgery.fuse.graph.memory import written_between
from slabformer.surgery.fuse.graph.parts import name_of
from slabformer.surgery.fuse.graph.sites import Site, along, channel_labels, readers_of_input
from slabformer.surgery.fuse.graph.trace import Trace
from slabformer.surgery.fuse.refusal import RefusalError
from slabformer.surgery.fuse.report import Action
from slabformer.surgery.fuse.search.found import Found
from slabformer.surgery.fuse.search.neighbours import Neighbours, has_hooks
from slabformer.surgery.fuse.search.ranges import need_range
from slabformer.surgery.fuse.search.sources import Sources
from slabformer.surgery.fuse.search.stream import stream_targets
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.plan import Edit, Plan, Role, Target


def decide(model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> Plan:
    """Fold every norm that can be folded in all ``traces``, forward where possible.

    A norm that is gone is the identity to the others, so the search runs until nothing more can be folded.
    """
    decider = _Decider(model, norms, traces, fixed_size)
    plan, known, progress = decider.plan, decider.known, True
    while progress:
        progress = False
        for norm in reversed(norms):
            if norm.index in known.gone or norm.index in plan.untouchable:
                continue
            try:
                decider.need_own(norm)
                plan.edits.append(decider.decide(norm))
                known.gone.add(norm.index)
                progress = True
            except RefusalError as error:
                plan.reasons[norm.index] = str(error)
    plan.tied, plan.shared = known.owners.tied, known.owners.shared
    return plan


class _Decider:
    def __init__(self, model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> None:
        self.model, self.norms, self.traces = model, norms, traces
        self.known = Neighbours(model, norms, traces, fixed_size)
        self.plan = Plan(untouchable=self.known.untouchable)

    def need_own(self, norm: Norm) -> None:
        """Refuse norms that something other than their neighbours looks at."""
        for name in self.known.owners.names_in(norm.module):
            readers = [user for trace in self.traces for user in trace.users(name)]
            if readers:
                self.plan.untouchable.add(norm.index)
                raise RefusalError(f"left as it is, {name} is read raw by {describe(readers[0])}")
        if any(name in trace.watched for trace in self.traces for name in norm.names):
            raise RefusalError("keep names it")
        if has_hooks(norm.module):
            raise RefusalError("it has forward hooks, which see its output")
        if not any(norm.index in trace.calls for trace in self.traces):
            raise RefusalError("it is not called on the example inputs, or its output is not used")
        self.known.wrappers.need_plain_norm(norm)

    def decide(self, norm: Norm) -> Edit:
        """Forward, else backward, else forward with the stream in front of it moved; else RefusalError."""
        reasons = []
        for action, ways in WAYS:
            try:
                edit = Edit(norm.index, action, ways(self, norm))
                need_range(self.model, self.norms, self.known.pads, self.plan.edits, edit)
                return edit
            except RefusalError as error:
                reasons.append(str(error))
        # the third way is of interest only where zeros are what bars the first
        barred = any(word in reasons[0] for word in ("padded", "unevenly", "to pad in its stead"))
        raise RefusalError("; ".join(reasons if barred else reasons[:2]))

    def forward(self, norm: Norm) -> tuple[Target, ...]:
        """All consumers, each able to take the norm over."""
        return self.consumers(norm, "map").exclusive()

    def through_stream(self, norm: Norm) -> tuple[Target, ...]:
        """All consumers, for the scale, and all that has to do with the stream in front."""
        found = self.consumers(norm, "scale")
        for trace in self.traces:
            calls = trace.calls.get(norm.index, [])
            if len(calls) > 1:
                raise RefusalError("it is called more than once")
            for target, node in stream_targets(self.known, norm, calls[0], trace) if calls else ():
                found.add(target, trace, node)
        return found.exclusive()

    def consumers(self, norm: Norm, role: Role) -> Found:
        """All that reads the norm."""
        found = Found(self.known.owners, self.traces)
        refusals: list[str] = []
        known = self.known
        for trace in self.traces:
            calls = trace.calls.get(norm.index, [])
            seeds = {call: channel_labels(call, norm.channel_dim) for call in calls}
            ends = downstream(trace, seeds, known.gone, known.fixed_size, scale_only=role == "scale", scaled=True)
            for end in ends:
                try:
                    for target in self.takers(norm, end, trace, role):
                        found.add(replace(target, factor=end.factor), trace, end.node)
                except RefusalError as error:
                    refusals.append(str(error))
            if any(written_between(trace, call, ends) for call in calls):
                refusals.append("its input is changed in place before its output is read")
        if refusals:
            raise RefusalError(_join(refusals, also=bool(found)))
        if not found:
            raise RefusalError("its output is not used")
        return found

    def takers(self, norm: Norm, end: End, trace: Trace, role: Role) -> list[Target]:
        """The neighbours at ``end`` of a forward fold: one, or each direction of a recurrent layer."""
        if end.refusal is not None:
            raise RefusalError(end.refusal)
        if end.node.target is NORM:
            if end.node.args[1] == norm.index:
                raise RefusalError("its output feeds a norm that cannot take it over")
            return [self.known.at_norm(end.node, end.labels, role, "next")]
        if end.node.target is PAD:
            index = along(end.labels, -1, end.node.meta["val"].shape[-1], "pad")
            return [self.known.at_pad(end.node, index, role, "next")]
        if end.node.op == "output":
            raise RefusalError("its output is the model's output")
        sites = readers_of_input(end.node)
        if not sites:
            raise RefusalError(f"its output feeds {describe(end.node)}")
        return [self.taker(site, end, trace, role) for site in sites]

    def taker(self, site: Site, end: End, trace: Trace, role: Role) -> Target:
        """The Linear or Conv at ``end`` of a forward fold."""
        if end.source is not site.input:
            raise RefusalError(f"its output serves as a weight or state of {describe(end.node)}")
        index = along(end.labels, site.axis, site.num_in, site.words)
        if site.padded and role == "map":
            how = "transposed convolution, which spreads it unevenly" if site.transposed else "padded convolution"
            raise RefusalError(f"it is followed by a {how} ({name_of(site, trace)})")
        return self.known.at_site(site, index, trace, role, "next")

    def backward(self, norm: Norm) -> tuple[Target, ...]:
        """All that its input is made of, each read by nothing else."""
        found = Found(self.known.owners, self.traces)
        for trace in self.traces:
            for target, node in Sources(self.known, norm, trace).targets():
                found.add(target, trace, node)
        return found.exclusive()


#: what to try, in this order, and what the report calls it
WAYS: tuple[tuple[Action, Callable[[_Decider, Norm], tuple[Target, ...]]], ...] = (
    ("forward", _Decider.forward),
    ("backward", _Decider.backward),
    ("forward", _Decider.through_stream),
)


def _join(refusals: list[str], also: bool) -> str:
    """At most two different reasons in one clause."""
    unique = list(dict.fromkeys(refusals))[:2]
    if also:
        unique = [re.sub("^its output ", "its output also ", reason) for reason in unique]
        unique = [f"{reason} (post-norm block)" if reason.endswith("an add") else reason for reason in unique]
    return " and ".join(unique)
