"""Fold norms into their neighbours: the graph finds, rules decide, the module tree changes, a report tells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slabformer.surgery.fuse.check import check_examples, check_model, check_not_compiled, shapes_of
from slabformer.surgery.fuse.files import load_fused, save_fused
from slabformer.surgery.fuse.fold import commit
from slabformer.surgery.fuse.norms import Norm
from slabformer.surgery.fuse.plan import Plan, outcomes
from slabformer.surgery.fuse.propose import propose
from slabformer.surgery.fuse.report import FuseReport, NormOutcome
from slabformer.surgery.fuse.size import at_another_size, fix_size_, sizes_of
from slabformer.surgery.fuse.ties import Untied
from slabformer.surgery.fuse.trial import Trial
from slabformer.surgery.fuse.twin import Example, twin

__all__ = ["FuseReport", "NormOutcome", "fuse", "fuse_", "load_fused", "save_fused"]

logger = logging.getLogger(__name__)


def fuse(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
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

    Args:
        model: In eval mode. The copy keeps class, names, dtype, device and hooks.
        example_inputs: A tensor, a tuple of positional arguments, or a list of such: a fold must hold for each of them.
        example_kwargs: Keyword arguments of every example.
        fixed_size: Take a pad by 0 at these sizes as none, try no other, and let the fused model refuse them.
        untie: Where a fold needs that, give a head that shares its weight with an embedding one of its own, and a layer
            that stands under several names, each called behind another norm, one under each; the rest stays shared.
        allow_gamma: Fuse PRepBNs that still hold their norm, as they run in eval mode: as RepBN.

    Returns:
        The fused copy, and one outcome per norm.

    Raises:
        TypeError: If the example inputs are of the wrong kind.
        ValueError: If the model is in train mode, wrapped, compiled, sharded, quantised, on the meta device, without
            norms, still fading, cannot be copied, or does not run on the example inputs.
    """
    check_model(model, allow_gamma)
    examples = check_examples(example_inputs, example_kwargs)
    copied = twin(model)
    return copied, _fuse(copied, examples, fixed_size, untie, allow_gamma)


def fuse_(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    fixed_size: bool = False,
    untie: bool = False,
    allow_gamma: bool = False,
) -> FuseReport:
    """:func:`fuse` in place: the same arguments and errors, all raised before anything changes; returns the report."""
    check_model(model, allow_gamma)
    check_not_compiled(model)
    return _fuse(model, check_examples(example_inputs, example_kwargs), fixed_size, untie, allow_gamma)


def _fuse(
    model: nn.Module, examples: Sequence[Example], fixed_size: bool, untie: bool, allow_gamma: bool
) -> FuseReport:
    norms = check_model(model, allow_gamma)
    trial = Trial(model, norms, examples)
    untied = Untied(model) if untie else None
    plan = propose(model, norms, examples, fixed_size, untied)
    solution = trial.settle(plan)
    other = None if fixed_size or len(examples) > 1 else _refuting(model, norms, examples[0], plan)
    if other is not None:
        examples = [*examples, other]
        plan = propose(model, norms, examples, fixed_size, untied)
        solution = Trial(model, norms, examples).settle(plan)
    if untied is not None:
        untied.put_together(solution.tensors)
    commit(model, solution, plan.untouchable)
    if fixed_size:
        fix_size_(model, [sizes_of(example) for example in examples])
    report = FuseReport(outcomes(norms, plan), shapes_of(examples))
    logger.debug("%s: %s", type(model).__name__, report.summary())
    return report


def _refuting(model: nn.Module, norms: Sequence[Norm], example: Example, plan: Plan) -> Example | None:
    """``example`` at another image size, if ``plan`` changes the outputs there.

    A graph does not show what a forward does at other sizes only, such as ``if pad > 0: pad``.
    """
    other = at_another_size(example)
    if other is None:
        return None
    try:
        trial = Trial(model, norms, [other])
    except ValueError:  # a model for one size
        return None
    return None if trial.holds(plan) else other
