"""Fold norms into their neighbours: the graph finds, rules decide, the module tree changes, a report tells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from slabformer.surgery.convert import staying_norms
from slabformer.surgery.fuse.report import FuseReport, NormOutcome
from slabformer.surgery.fuse.search.asked import OutputLike, check_keep, check_outputs, rehearse, watched_outputs
from slabformer.surgery.fuse.search.check import (
    check_examples,
    check_model,
    check_not_compiled,
    check_values,
    shapes_of,
)
from slabformer.surgery.fuse.search.methods import changed_methods
from slabformer.surgery.fuse.search.propose import propose
from slabformer.surgery.fuse.search.trial import Trial
from slabformer.surgery.fuse.tree.copies import Example, Output, deployed_twin, twin
from slabformer.surgery.fuse.tree.files import load_fused, save_fused
from slabformer.surgery.fuse.tree.fold import Solution, commit, solve
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.plan import Plan, outcomes
from slabformer.surgery.fuse.tree.size import at_another_size, fix_size_, sizes_of
from slabformer.surgery.fuse.tree.ties import Untied, note_untied_
from slabformer.surgery.fuse.tree.watch import hooked

__all__ = ["FuseReport", "NormOutcome", "fuse", "fuse_", "load_fused", "save_fused"]

logger = logging.getLogger(__name__)


def fuse(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    keep: str | Sequence[str] = (),
    outputs: OutputLike | Sequence[OutputLike] = (),
    fixed_size: bool = False,
    untie: bool = False,
    allow_gamma: bool = False,
) -> tuple[nn.Module, FuseReport]:
    """Fold the norms of ``model`` into their neighbours, on a deep copy; outputs do not change.

    Each RepBN, PRepBN, BatchNorm and Affine is one scale and shift per channel in eval mode. The model is traced with
    ``torch.export``; from each norm the map is followed through operations that commute with it. If all that it
    reaches are Linears and unpadded Convs, they take it over; else what its input is made of does, where that feeds
    nothing else: Linears and Convs, tables of embeddings, class tokens and other parameters, and sums of them; else,
    where only zero padding stands in the way, what follows takes over the scale and the residual stream in front is
    moved by the rest; else an :class:`Affine` stays in its place, and the report says why. Changes are tried on a copy
    in float64 first, and folds that would change an output are left out. A single example of images is tried at
    another size as well, and where the outputs differ that size becomes an example too: code such as ``if pad > 0``
    shows in no graph. Other inputs whose size matters need several examples, and so do other ways in: a table that took
    a norm over holds what the norm made of its rows, which ``inputs_embeds`` must then be, too.

    Only the forward is held fast unless ``outputs`` and ``keep`` say more: a norm behind the last block may go into the
    head, so that ``forward_features`` returns what comes before it. The report names the methods that this is true of.
    Layers that hold more than their forward shows keep their norms: adapters must be merged for good first.

    Args:
        model: In eval mode. The copy keeps class, names, dtype, device and hooks.
        example_inputs: A tensor, a tuple of positional arguments, or a list of such: a fold must hold for each of them.
        example_kwargs: Keyword arguments of every example.
        keep: Names of modules whose outputs must stay too, or patterns (``"blocks.*"``; ``*`` matches dots). A norm
            among them stays, as an :class:`Affine`.
        outputs: What must stay beside the forward: names of methods that take the example inputs
            (``"forward_features"``), or functions of ``(model, *inputs)`` that return tensors.
        fixed_size: Take a pad by 0 at these sizes as none, try no other, and let the fused model refuse them.
        untie: Where a fold needs that, give a head that shares its weight with an embedding one of its own, and a layer
            that stands under several names, each called behind another norm, one under each; the rest stays shared.
        allow_gamma: Fuse PRepBNs that still hold their norm, as they run in eval mode: as RepBN.

    Returns:
        The fused copy, and one outcome per norm.

    Raises:
        TypeError: If the example inputs, ``keep`` or ``outputs`` are of the wrong kind.
        ValueError: If the model is in train mode, wrapped, compiled, sharded, quantised, on the meta device, without
            norms, still fading, cannot be copied, or does not run on the example inputs; if ``keep`` matches nothing
            that runs, or an output of ``outputs`` is missing, fails or holds no tensor.
    """
    check_model(model, allow_gamma)
    examples = check_examples(example_inputs, example_kwargs)
    copied = twin(model)
    return copied, _fuse(copied, examples, keep, outputs, fixed_size, untie, allow_gamma)


def fuse_(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    keep: str | Sequence[str] = (),
    outputs: OutputLike | Sequence[OutputLike] = (),
    fixed_size: bool = False,
    untie: bool = False,
    allow_gamma: bool = False,
) -> FuseReport:
    """:func:`fuse` in place: the same arguments and errors, all raised before anything changes; returns the report."""
    check_model(model, allow_gamma)
    check_not_compiled(model)
    examples = check_examples(example_inputs, example_kwargs)
    return _fuse(model, examples, keep, outputs, fixed_size, untie, allow_gamma)


def _fuse(
    model: nn.Module,
    inputs: Sequence[Example],
    keep: str | Sequence[str],
    outputs: OutputLike | Sequence[OutputLike],
    fixed_size: bool,
    untie: bool,
    allow_gamma: bool,
) -> FuseReport:
    norms = check_model(model, allow_gamma)
    check_values(norms)
    kept, asked = check_keep(model, norms, keep), [Output(), *check_outputs(model, outputs)]
    watched = (*watched_outputs(kept), *hooked(model))

    def each_output(inputs: Sequence[Example]) -> list[Example]:
        return [replace(example, output=output, watched=watched) for example in inputs for output in asked]

    examples = each_output(inputs)
    if kept or len(asked) > 1:
        rehearse(deployed_twin(model), examples, kept)
    trial = Trial(model, norms, examples)
    untied = Untied(model) if untie else None
    plan = propose(model, norms, examples, fixed_size, untied)
    solution = _settle(trial, plan, examples)
    other = None if fixed_size or len(inputs) > 1 else at_another_size(inputs[0])
    if other is not None and _refutes(model, norms, each_output([other]), plan):
        inputs = [*inputs, other]
        examples = each_output(inputs)
        plan = propose(model, norms, examples, fixed_size, untied)
        solution = _settle(Trial(model, norms, examples), plan, examples)
    if untied is not None:
        untied.put_together(solution.tensors)
    before, after = deployed_twin(model, trial.dtype), deployed_twin(model, trial.dtype)
    commit(after, solution, plan.untouchable)
    changed = changed_methods(before, after, trial.examples[0])
    del before, after
    commit(model, solution, plan.untouchable)
    if untied is not None:
        note_untied_(model)
    if fixed_size:
        fix_size_(model, [sizes_of(example) for example in inputs])
    report = FuseReport(outcomes(norms, plan), shapes_of(inputs), staying_norms(model), changed)
    logger.debug("%s: %s", type(model).__name__, report.summary())
    return report


def _settle(trial: Trial, plan: Plan, examples: Sequence[Example]) -> Solution:
    """What is left of ``plan`` on trial, also where outputs are no longer hidden by parameters that are 0."""
    solution = trial.settle(plan)
    seeing = trial.seeing(examples) if trial.is_blind() else None
    if seeing is None:
        return solution
    seeing.settle(plan)
    return solve(trial.model, trial.norms, plan.edits)


def _refutes(model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example], plan: Plan) -> bool:
    """Whether ``plan`` changes what is asked for on ``examples``, which have another image size.

    A graph does not show what a forward does at other sizes only, such as ``if pad > 0: pad``.
    """
    try:
        trial = Trial(model, norms, examples)
    except ValueError:  # a model for one size
        return False
    return not trial.holds(plan)
