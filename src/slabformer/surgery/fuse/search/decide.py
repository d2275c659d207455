"""Propose folds: trace a model, and decide for every norm which neighbours take it over, or why none can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from slabformer.surgery.fuse.graph.flow import End, downstream, written_between
from slabformer.surgery.fuse.graph.rules import channel_labels
from slabformer.surgery.fuse.graph.trace import NORM, Trace, describe, trace_model, why_untraceable
from slabformer.surgery.fuse.report import Action
from slabformer.surgery.fuse.search.backward import Sources
from slabformer.surgery.fuse.search.neighbours import Found, Neighbours, has_hooks
from slabformer.surgery.fuse.search.stream import stream_targets
from slabformer.surgery.fuse.tree.copies import Example, deployed_copy
from slabformer.surgery.fuse.tree.norms import Norm, Pad, find_norms
from slabformer.surgery.fuse.tree.plan import Edit, Plan, Role, Target, share
from slabformer.surgery.fuse.tree.sharing import Untied
from slabformer.surgery.fuse.tree.values import gain_of, maps_after, tensor_at
from slabformer.surgery.reasons import Reason, RefusalError, Why

#: reasons whose words begin with the norm's output
OF_READERS = {
    *(Reason.MODEL_OUTPUT, Reason.FEEDS_SUM, Reason.FEEDS_OPERATION, Reason.FEEDS_NORM, Reason.KEPT_OUTPUT),
    *(Reason.FURTHER_ARGUMENT, Reason.PADDED, Reason.CAST, Reason.PICKED_BY_MASK),
}
#: reasons against folding forward that moving the stream in front helps against
BARRED_BY_ZEROS = {Reason.PADDED, Reason.UNEVEN, Reason.SCALE_NEAR_ZERO}
#: larger fills stand for channels that the norm all but erases: half precision would lose the digits of the product
LARGEST_FILL = 1e3
#: a stream that is moved further than this, in units of what the norm takes for its spread, rounds visibly there
LARGEST_MOVE = 64.0
#: a residual stream is divided by scales between one over this and this: channels keep their digits, whatever their
#: scale, but half precision has few exponents
LARGEST_CARRIED, LARGEST_CARRIED_IN_FLOAT16 = 1e8, 64.0


def propose(
    model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example], fixed_size: bool, untied: Untied | None
) -> Plan:
    """The folds that hold for all ``examples``.

    Args:
        model: Read only, unless it may be untied.
        norms: Of the model.
        examples: Inputs to trace it on.
        fixed_size: Whether they are the only size.
        untied: Of the same model, to take apart there what stands in the way; None leaves it as it is.
    """
    plan = _decided(model, norms, examples, fixed_size)
    if untied is not None:
        return _taken_apart(plan, untied, norms, examples, fixed_size)
    if plan.shared:
        apart, folded = deployed_copy(model), {edit.norm for edit in plan.edits}
        for edit in _taken_apart(plan, Untied(apart), find_norms(apart), examples, fixed_size).edits:
            if edit.norm not in folded:
                why = plan.reasons[edit.norm]
                plan.reasons[edit.norm] = Why(why.codes, f"{why.words}; untie=True folds it {edit.action}")
    return plan


def _taken_apart(
    plan: Plan, untied: Untied, norms: Sequence[Norm], examples: Sequence[Example], fixed_size: bool
) -> Plan:
    while untied.take_apart(plan.tied | plan.shared):
        plan = _decided(untied.model, norms, examples, fixed_size)
    return plan


def _decided(model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example], fixed_size: bool) -> Plan:
    try:
        traces = [trace_model(deployed_copy(model), norms, example) for example in examples]
    except Exception as error:
        words = f"torch.export cannot trace the model ({why_untraceable(error)})"
        return Plan(reasons={norm.index: Why.of(Reason.NOT_TRACEABLE, words) for norm in norms})
    return _decide(model, norms, traces, fixed_size)


def _decide(model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> Plan:
    """Fold every norm that can be folded in all ``traces``, forward where possible.

    A norm that is gone is the identity to the others, so the search runs until nothing more can be folded.
    """
    decider = _Decider(model, norms, traces, fixed_size)
    # along sums each norm gives its scale to the next, which must still be there
    in_order = sorted(norms, key=decider.first_call)
    while decider.fold(reversed(norms), decider.decide) or decider.fold(in_order, decider.carry):
        pass
    plan, known = decider.plan, decider.known
    plan.tied, plan.shared = known.owners.tied, known.owners.shared
    return plan


class _Decider:
    def __init__(self, model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> None:
        self.model, self.norms, self.traces = model, norms, traces
        self.known = Neighbours(model, norms, traces, fixed_size)
        self.plan = Plan(untouchable=self.known.untouchable)

    def fold(self, norms: Iterable[Norm], decide: Callable[[Norm], Edit]) -> bool:
        """Fold those that ``decide`` has a way for; whether there was one."""
        progress = False
        for norm in norms:
            if norm.index in self.known.gone or norm.index in self.plan.untouchable:
                continue
            try:
                self.need_own(norm)
                self.plan.edits.append(decide(norm))
                self.known.gone.add(norm.index)
                progress = True
            except RefusalError as error:
                self.plan.reasons[norm.index] = error.why
        return progress

    def first_call(self, norm: Norm) -> int:
        """Where it is called first; norms that are not called come first."""
        return min((trace.order[call] for trace in self.traces for call in trace.calls.get(norm.index, [])), default=0)

    def need_own(self, norm: Norm) -> None:
        """Refuse norms that something other than their neighbours looks at."""
        for name in self.known.owners.names_in(norm.module):
            readers = [user for trace in self.traces for user in trace.users(name)]
            if readers:
                self.plan.untouchable.add(norm.index)
                raise RefusalError(Reason.READ_RAW, f"left as it is, {name} is read raw by {describe(readers[0])}")
        if any(name in trace.watched for trace in self.traces for name in norm.names):
            raise RefusalError(Reason.KEEP, "keep names it")
        if has_hooks(norm.module):
            raise RefusalError(Reason.HOOKS, "it has forward hooks, which see its output")
        if not any(norm.index in trace.calls for trace in self.traces):
            raise RefusalError(Reason.NOT_USED, "it is not called on the example inputs, or its output is not used")
        self.known.wrappers.need_plain_norm(norm)

    def decide(self, norm: Norm) -> Edit:
        """Forward, else backward, else forward with the stream in front of it moved; else RefusalError."""
        refusals: list[Why] = []
        for action, ways in WAYS:
            try:
                edit = Edit(norm.index, action, ways(self, norm))
                need_range(self.model, self.norms, self.known.pads, self.plan.edits, edit)
                return edit
            except RefusalError as error:
                refusals.append(error.why)
        # the third way is of interest only where zeros are what bars the first
        barred = BARRED_BY_ZEROS.intersection(refusals[0].codes)
        raise RefusalError.of(Why.joined(refusals if barred else refusals[:2], "; "))

    def carry(self, norm: Norm) -> Edit:
        """Forward with the scale carried along the sums that read it, for a norm that has no other way."""
        earlier = self.plan.reasons[norm.index]
        if Reason.FEEDS_SUM not in earlier.codes:
            raise RefusalError.of(earlier)
        try:
            edit = Edit(norm.index, "forward", self.along_sums(norm))
            need_range(self.model, self.norms, self.known.pads, self.plan.edits, edit)
            return edit
        except RefusalError as error:
            is_new = not set(error.why.codes).issubset(earlier.codes)
            raise RefusalError.of(Why.joined([earlier, error.why], "; ") if is_new else earlier) from error

    def along_sums(self, norm: Norm) -> tuple[Target, ...]:
        """All that reads the norm, or a sum with it, and all that joins it there."""
        found, known = Found(self.known, self.traces), self.known
        for trace in self.traces:
            calls = trace.calls.get(norm.index, [])
            seeds = {call: channel_labels(call, norm.channel_dim) for call in calls}
            ends = downstream(trace, seeds, known.gone, known.fixed_size, scaled=True, through_sums=True)
            joins = [end for end in ends if end.joins]
            for end in (end for end in ends if not end.joins):
                role: Role = "map" if end.shifted else "scale"
                for target in self.readers(norm, end, trace, role, of="its output" if end.shifted else "a sum with it"):
                    found.add(replace(target, factor=end.factor if end.shifted else 1.0), trace, end.node)
            if any(written_between(trace, call, [end.node for end in ends if end.shifted]) for call in calls):
                raise RefusalError(Reason.IN_PLACE, "its input is changed in place before its output is read")
            for target, node in Sources.of_joins(known, joins, trace).targets():
                found.add(target, trace, node)
        return found.exclusive()

    def forward(self, norm: Norm) -> tuple[Target, ...]:
        """All consumers, each able to take the norm over."""
        return self.consumers(norm, "map").exclusive()

    def through_stream(self, norm: Norm) -> tuple[Target, ...]:
        """All consumers, for the scale, and all that has to do with the stream in front."""
        found = self.consumers(norm, "scale")
        for trace in self.traces:
            calls = trace.calls.get(norm.index, [])
            if len(calls) > 1:
                raise RefusalError(Reason.SHARED_NORM, "it is called more than once")
            for target, node in stream_targets(self.known, norm, calls[0], trace) if calls else ():
                found.add(target, trace, node)
        return found.exclusive()

    def consumers(self, norm: Norm, role: Role) -> Found:
        """All that reads the norm."""
        found = Found(self.known, self.traces)
        refusals: list[Why] = []
        known = self.known
        for trace in self.traces:
            calls = trace.calls.get(norm.index, [])
            seeds = {call: channel_labels(call, norm.channel_dim) for call in calls}
            ends = downstream(trace, seeds, known.gone, known.fixed_size, scale_only=role == "scale", scaled=True)
            for end in ends:
                try:
                    for target in self.readers(norm, end, trace, role):
                        found.add(replace(target, factor=end.factor), trace, end.node)
                except RefusalError as error:
                    refusals.append(error.why)
            if any(written_between(trace, call, [end.node for end in ends]) for call in calls):
                refusals.append(Why.of(Reason.IN_PLACE, "its input is changed in place before its output is read"))
        if refusals:
            raise RefusalError.of(_several(refusals, also=bool(found)))
        if not found:
            raise RefusalError(Reason.NOT_USED, "its output is not used")
        return found

    def readers(self, norm: Norm, end: End, trace: Trace, role: Role, of: str = "its output") -> list[Target]:
        """What reads the norm's output, or a sum with it, at ``end``."""
        if end.node.target is NORM and end.node.args[1] == norm.index:
            raise RefusalError(Reason.FEEDS_NORM, f"{of} feeds a norm that cannot take it over")
        if end.node.op == "output":
            raise RefusalError(Reason.MODEL_OUTPUT, f"{of} is the model's output")
        return self.known.readers(end, trace, role, f"{of} feeds")

    def backward(self, norm: Norm) -> tuple[Target, ...]:
        """All that its input is made of, each read by nothing else."""
        found = Found(self.known, self.traces)
        for trace in self.traces:
            for target, node in Sources.of_norm(self.known, norm, trace).targets():
                found.add(target, trace, node)
        return found.exclusive()


#: what to try, in this order, and what the report calls it
WAYS: tuple[tuple[Action, Callable[[_Decider, Norm], tuple[Target, ...]]], ...] = (
    ("forward", _Decider.forward),
    ("backward", _Decider.backward),
    ("forward", _Decider.through_stream),
)


def _several(refusals: Sequence[Why], also: bool) -> Why:
    """At most two different reasons in one clause; ``also`` where other readers could take the norm over."""
    unique = list(dict.fromkeys(refusals))[:2]
    return Why.joined([_beside_others(why) for why in unique] if also else unique, " and ")


def _beside_others(why: Why) -> Why:
    hint = " (post-norm block)" if Reason.FEEDS_SUM in why.codes else ""
    words = why.words.replace("its output ", "its output also ", 1) if why.codes[0] in OF_READERS else why.words
    return Why(why.codes, words + hint)


# --- values of scales -----------------------------------------------------------------------------------------------


def need_range(
    model: nn.Module, norms: Sequence[Norm], pads: Sequence[Pad], before: Sequence[Edit], edit: Edit
) -> None:
    """Refuse ``edit``, made after those ``before``, where a pad's fill or a move of the stream is out of range.

    Raises:
        RefusalError: Naming the first channel.
    """
    if all(target.pad is None and target.role in ("map", "scale") for target in edit.targets):
        return
    maps, fills = maps_after(norms, pads, [*before, edit])
    for target in edit.targets:
        if target.pad is not None:
            channel = first_beyond(fills[target.pad], LARGEST_FILL)
            if channel is not None:
                why = f"for {target.name} to pad in its stead"
                raise RefusalError(Reason.SCALE_NEAR_ZERO, f"its scale of channel {channel} is too near 0 {why}")
        if target.role in ("add", "subtract"):
            _need_small_move(model, target, *maps[edit.norm])
        if target.role in ("carry", "unscale"):
            _need_carried(maps[edit.norm][0], norms[edit.norm].reference.dtype)


def _need_small_move(model: nn.Module, target: Target, scale: Tensor, shift: Tensor) -> None:
    move = share(target.role, scale, shift)[1]
    channel = first_beyond(move * scale.abs().median(), LARGEST_MOVE)
    if channel is not None:
        words = f"its scale of channel {channel} is too near 0 to move the stream in front of it"
        raise RefusalError(Reason.SCALE_NEAR_ZERO, words)
    if target.gain is not None and not tensor_at(model, target.gain.name).is_meta:
        own = move.cpu()[target.index[target.gain.channels]] / gain_of(model, target.gain).cpu()
        if first_beyond(own, LARGEST_FILL) is not None:
            words = f"{target.gain.name} is too near 0 for {target.name} to move the stream"
            raise RefusalError(Reason.SCALE_NEAR_ZERO, words)


def _need_carried(scale: Tensor, dtype: torch.dtype) -> None:
    """Refuse to divide a residual stream by a scale that ``dtype`` could not hold the result of."""
    largest = LARGEST_CARRIED_IN_FLOAT16 if dtype is torch.float16 else LARGEST_CARRIED
    size = scale.abs()
    channel = first_beyond(torch.maximum(size, 1 / size), largest)
    if channel is not None:
        near = "near 0" if float(size[channel]) < 1 else "large"
        words = f"its scale of channel {channel} is too {near} to carry along the residual stream"
        raise RefusalError(Reason.SCALE_NEAR_ZERO, f"{words} ({float(scale[channel]):.2g})")


def first_beyond(values: Tensor, limit: float) -> int | None:
    """The first channel whose value is out of the range that half precision can work with, or None."""
    beyond = ~(values.abs() <= limit)
    return int(beyond.int().argmax()) if bool(beyond.any()) else None
