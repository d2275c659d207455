"""Decide for every norm which neighbours take it over, or why none can."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.fx import Node

from slabformer.surgery.fuse.flow import End, downstream, producers, written_between
from slabformer.surgery.fuse.found import Found
from slabformer.surgery.fuse.graph import Trace
from slabformer.surgery.fuse.labels import RefusalError, describe
from slabformer.surgery.fuse.marks import NORM, PAD
from slabformer.surgery.fuse.norms import Norm
from slabformer.surgery.fuse.owners import Owners
from slabformer.surgery.fuse.pads import find_pads
from slabformer.surgery.fuse.parts import Part, bias_parts, name_of, weight_part
from slabformer.surgery.fuse.plan import Edit, Plan, Role, Side, Target
from slabformer.surgery.fuse.ranges import need_range
from slabformer.surgery.fuse.report import Action
from slabformer.surgery.fuse.sites import Site, along, channel_labels, readers_of_input
from slabformer.surgery.fuse.stream import pair, stream_targets


def decide(model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> Plan:
    """Fold every norm that can be folded in all ``traces``, forward where possible.

    A norm that is gone is the identity to the others, so the search runs until nothing more can be folded.
    """
    decider = _Decider(model, norms, traces, fixed_size)
    plan, progress = decider.plan, True
    while progress:
        progress = False
        for norm in reversed(norms):
            if norm.index in decider.gone or norm.index in plan.untouchable:
                continue
            try:
                decider.need_own(norm)
                plan.edits.append(decider.decide(norm))
                decider.gone.add(norm.index)
                progress = True
            except RefusalError as error:
                plan.reasons[norm.index] = str(error)
    plan.tied, plan.shared = decider.owners.tied, decider.owners.shared
    return plan


class _Decider:
    def __init__(self, model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> None:
        self.model, self.owners, self.pads = model, Owners(model), find_pads(model)
        self.norms, self.traces, self.fixed_size = norms, traces, fixed_size
        self.gone: set[int] = set()
        self.plan = Plan()

    def need_own(self, norm: Norm) -> None:
        """Refuse norms that something other than their neighbours looks at."""
        for name in self.owners.names_in(norm.module):
            readers = [user for trace in self.traces for user in trace.users(name)]
            if readers:
                self.plan.untouchable.add(norm.index)
                raise RefusalError(f"left as it is, {name} is read raw by {describe(readers[0])}")
        if _has_hooks(norm.module):
            raise RefusalError("it has forward hooks, which see its output")
        if not any(norm.index in trace.calls for trace in self.traces):
            raise RefusalError("it is not called on the example inputs, or its output is not used")

    def decide(self, norm: Norm) -> Edit:
        """Forward, else backward, else forward with the stream in front of it moved; else RefusalError."""
        reasons = []
        for action, ways in WAYS:
            try:
                edit = Edit(norm.index, action, ways(self, norm))
                need_range(self.model, self.norms, self.pads, self.plan.edits, edit)
                return edit
            except RefusalError as error:
                reasons.append(str(error))
        # the third way is of interest only where zeros are what bars the first
        barred = any(word in reasons[0] for word in ("padded", "to pad in its stead"))
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
            for target, node in stream_targets(self, norm, calls[0], trace) if calls else ():
                found.add(target, trace, node)
        return found.exclusive()

    def consumers(self, norm: Norm, role: Role) -> Found:
        """All that reads the norm."""
        found = Found(self.owners, self.traces)
        refusals: list[str] = []
        for trace in self.traces:
            calls = trace.calls.get(norm.index, [])
            seeds = {call: self.labels_of(norm, call) for call in calls}
            ends = downstream(trace, seeds, self.gone, self.fixed_size, scale_only=role == "scale", scaled=True)
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
            return [self.at_norm(end.node, end.labels, role, "next")]
        if end.node.target is PAD:
            index = along(end.labels, -1, end.node.meta["val"].shape[-1], "pad")
            return [self.at_pad(end.node, index, role, "next")]
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
            raise RefusalError(f"it is followed by a padded convolution ({name_of(site, trace)})")
        return self.at_site(site, index, trace, role, "next")

    def at_norm(self, node: Node, labels: Tensor, role: Role, side: Side) -> Target:
        """The norm at ``node``, whose map changes."""
        other = self.norms[node.args[1]]  # type: ignore[index]
        if _has_hooks(other.module) or other.index in self.plan.untouchable:
            raise RefusalError("its output feeds a norm that cannot take it over")
        axis = range(labels.ndim)[other.channel_dim] - labels.ndim
        return Target(other.name, role, side, along(labels, axis, other.num_channels, "norm"), norm=other.index)

    def at_pad(self, node: Node, index: Tensor, role: Role, side: Side) -> Target:
        """The pad at ``node``, which must pad with something else once the norm is gone."""
        pad = self.pads[node.args[-1]]  # type: ignore[index]
        if _has_hooks(pad.module):
            raise RefusalError(f"{pad.name} has forward hooks, which see what it pads")
        return Target(pad.name, role, side, index, pad=pad.index)

    def backward(self, norm: Norm) -> tuple[Target, ...]:
        """All producers, each read by nothing else."""
        found = Found(self.owners, self.traces)
        for trace in self.traces:
            for call in trace.calls.get(norm.index, []):
                sites, pads, between = producers(trace, call, self.gone, self.fixed_size)
                for node in pads:
                    index = self.matching(norm, node, channel_labels(node, -1), trace, "a pad", between)
                    found.add(self.at_pad(node, index, "map", "previous"), trace, node)
                for site in sites:
                    labels, name = channel_labels(site.node, site.axis), name_of(site, trace)
                    index = self.matching(norm, site.node, labels, trace, name, between)
                    found.add(self.at_site(site, index, trace, "map", "previous"), trace, site.node)
        return found.exclusive()

    def matching(
        self, norm: Norm, node: Node, labels: Tensor, trace: Trace, name: str, between: Collection[Node]
    ) -> Tensor:
        """Channel of ``norm`` that each of ``labels``, the output channels of ``node``, becomes; -1 for none.

        Labels must pass all operations ``between`` them and the norm: one that refuses them hides channels from it.
        """
        sinks: list[tuple[Tensor, Tensor]] = []
        elsewhere: list[End] = []
        for end in downstream(trace, {node: labels}, self.gone, self.fixed_size):
            if end.node.target is NORM and end.node.args[1] == norm.index:
                sinks.append((end.labels, self.labels_of(norm, end.node)))
            elif end.node.target is not PAD or end.refusal is not None:
                elsewhere.append(end)
        index = pair(sinks, labels.numel())
        if index is None:
            raise RefusalError(f"an output channel of {name} meets several of its channels")
        for end in elsewhere:
            if end.node in between:
                raise RefusalError(f"seen from {name}, {end.refusal}")
            others = end.labels[end.labels >= 0].unique().long()
            if bool((index[others] >= 0).any()):
                raise RefusalError(f"the output of {name} also feeds {describe(end.node)}")
        return index

    def labels_of(self, norm: Norm, call: Node) -> Tensor:
        """Labels of the norm's output."""
        return channel_labels(call, norm.channel_dim)

    def at_site(self, site: Site, index: Tensor, trace: Trace, role: Role, side: Side) -> Target:
        """``site`` as a target, with a bias to hold the shift."""
        weight, name = weight_part(site, trace), name_of(site, trace)
        self.owners.need_single(weight.name)
        if site.bias is None:
            bias: tuple[Part, ...] = (replace(weight, name=self.owners.new_bias(weight.name), axis=0),)
        else:
            bias = bias_parts(site, trace, name)
            for part in bias:
                self.owners.need_single(part.name)
        module = self.owners.module(weight.name)
        if side == "next" and module._forward_pre_hooks:
            raise RefusalError(f"{name} has forward pre-hooks, which see its input")
        if side == "previous" and module._forward_hooks:
            raise RefusalError(f"{name} has forward hooks, which see its output")
        return Target(name, role, side, index, weight, bias, site.bias is None, groups=site.groups)


#: what to try, in this order, and what the report calls it
WAYS: tuple[tuple[Action, Callable[[_Decider, Norm], tuple[Target, ...]]], ...] = (
    ("forward", _Decider.forward),
    ("backward", _Decider.backward),
    ("forward", _Decider.through_stream),
)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _join(refusals: list[str], also: bool) -> str:
    """At most two different reasons in one clause."""
    unique = list(dict.fromkeys(refusals))[:2]
    if also:
        unique = [re.sub("^its output ", "its output also ", reason) for reason in unique]
        unique = [f"{reason} (post-norm block)" if reason.endswith("an add") else reason for reason in unique]
    return " and ".join(unique)
