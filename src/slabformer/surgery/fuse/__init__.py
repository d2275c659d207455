"""Fold norms into their neighbours: the graph finds, rules decide, the module tree changes, a report tells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slabformer.surgery.fuse.check import check_examples, check_model, shapes_of
from slabformer.surgery.fuse.decide import Plan, decide
from slabformer.surgery.fuse.fold import commit
from slabformer.surgery.fuse.graph import trace
from slabformer.surgery.fuse.norms import Norm
from slabformer.surgery.fuse.report import FuseReport, NormOutcome
from slabformer.surgery.fuse.trial import Trial
from slabformer.surgery.fuse.twin import Example, deployed_twin, export_error, twin

__all__ = ["FuseReport", "NormOutcome", "fuse", "fuse_"]

logger = logging.getLogger(__name__)


def fuse(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    fixed_size: bool = False,
    allow_gamma: bool = False,
) -> tuple[nn.Module, FuseReport]:
    """:func:`fuse_` on a deep copy."""
    check_model(model, allow_gamma)
    examples = check_examples(example_inputs, example_kwargs)
    copied = twin(model)
    return copied, _fuse(copied, examples, fixed_size, allow_gamma)


def fuse_(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    fixed_size: bool = False,
    allow_gamma: bool = False,
) -> FuseReport:
    """doc"""
    return _fuse(model, check_examples(example_inputs, example_kwargs), fixed_size, allow_gamma)


def _fuse(model: nn.Module, examples: Sequence[Example], fixed_size: bool, allow_gamma: bool) -> FuseReport:
    norms = check_model(model, allow_gamma)
    trial = Trial(model, norms, examples)
    plan = _plan(model, norms, examples, fixed_size)
    commit(model, trial.settle(plan), plan.untouchable)
    report = FuseReport(_outcomes(norms, plan), shapes_of(examples))
    logger.info("%s: %s", type(model).__name__, report.summary())
    return report


def _plan(model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example], fixed_size: bool) -> Plan:
    try:
        traces = [trace(deployed_twin(model), norms, example) for example in examples]
    except Exception as error:
        reason = f"torch.export cannot trace the model ({export_error(error)})"
        return Plan(reasons={norm.index: reason for norm in norms})
    return decide(model, norms, traces, fixed_size)


def _outcomes(norms: Sequence[Norm], plan: Plan) -> tuple[NormOutcome, ...]:
    folded = {edit.norm: edit for edit in plan.edits}
    outcomes = []
    for norm in norms:
        edit = folded.get(norm.index)
        if edit is None:
            outcomes.append(NormOutcome(norm.name, "kept", reason=plan.reasons[norm.index]))
        else:
            outcomes.append(NormOutcome(norm.name, edit.action, tuple(target.name for target in edit.targets)))
    return tuple(outcomes)
