"""Propose folds: trace a model, decide, and where layers stand in several places, look at what untying them gains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slabformer.surgery.fuse.graph.trace import trace, why_untraceable
from slabformer.surgery.fuse.search.decide import decide
from slabformer.surgery.fuse.tree.copies import Example, deployed_twin
from slabformer.surgery.fuse.tree.norms import Norm, find_norms
from slabformer.surgery.fuse.tree.plan import Plan
from slabformer.surgery.fuse.tree.ties import Untied


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
        apart, folded = deployed_twin(model), {edit.norm for edit in plan.edits}
        for edit in _taken_apart(plan, Untied(apart), find_norms(apart), examples, fixed_size).edits:
            if edit.norm not in folded:
                plan.reasons[edit.norm] += f"; untie=True folds it {edit.action}"
    return plan


def _taken_apart(
    plan: Plan, untied: Untied, norms: Sequence[Norm], examples: Sequence[Example], fixed_size: bool
) -> Plan:
    while untied.take_apart(plan.tied | plan.shared):
        plan = _decided(untied.model, norms, examples, fixed_size)
    return plan


def _decided(model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example], fixed_size: bool) -> Plan:
    try:
        traces = [trace(deployed_twin(model), norms, example) for example in examples]
    except Exception as error:
        reason = f"torch.export cannot trace the model ({why_untraceable(error)})"
        return Plan(reasons={norm.index: reason for norm in norms})
    return decide(model, norms, traces, fixed_size)
