"""Fold norms into their neighbours: the graph finds, rules decide, the module tree changes, a report tells."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slabformer.surgery.convert import staying_norms
from slabformer.surgery.fuse.consumers import (
    Consumer,
    ModuleConsumer,
    Sample,
    Site,
    register_consumer,
)
from slabformer.surgery.fuse.graph.rules import Call, Rule, moved, register_rule, same
from slabformer.surgery.fuse.report import FuseReport, NormOutcome
from slabformer.surgery.fuse.search.decide import propose
from slabformer.surgery.fuse.search.methods import changed_methods
from slabformer.surgery.fuse.search.request import (
    OutputLike,
    Wanted,
    check_examples,
    check_model,
    check_not_compiled,
    shapes_of,
)
from slabformer.surgery.fuse.search.trial import Trial, is_refuted_by
from slabformer.surgery.fuse.tree.copies import Example, copy_model
from slabformer.surgery.fuse.tree.files import load_fused, save_fused
from slabformer.surgery.fuse.tree.fold import commit
from slabformer.surgery.fuse.tree.norms import Norm, find_norms
from slabformer.surgery.fuse.tree.sharing import Untied, note_untied_
from slabformer.surgery.fuse.tree.size import at_another_size, fix_size_, sizes_of
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.reasons import Reason, RefusalError

__all__ = [
    "Call",
    "Consumer",
    "FuseReport",
    "ModuleConsumer",
    "NormOutcome",
    "Reason",
    "RefusalError",
    "Rule",
    "Sample",
    "Site",
    "fuse",
    "fuse_",
    "load_fused",
    "moved",
    "register_consumer",
    "register_rule",
    "same",
    "save_fused",
]

logger = logging.getLogger(__name__)

#: bytes of a model whose weights should not be held twice: a collection of garbage takes a fraction of a second
LARGE = 2**26


@makes_ordinary_tensors
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
    ``torch.export``; from each norm the map is followed through operations that commute with it. If all that it reaches
    are Linears and unpadded Convs, they take it over; else what its input is made of does, where that feeds nothing
    else: Linears and Convs, tables of embeddings, class tokens and other parameters, and sums of them; else, where only
    zero padding stands in the way, what follows takes over the scale and the residual stream in front is moved by the
    rest; else, where the norm's output is the residual stream, as in post-norm blocks, what reads that takes over the
    map and what is added to it is divided by the scale; else an :class:`Affine` stays in its place, and the report says
    why. Changes are tried on a copy in float64 first, and folds that would change an output are left out. A single
    example of images is tried at another size as well, and where the outputs differ that size becomes an example too:
    code such as ``if pad > 0`` shows in no graph. Other inputs whose size matters need several examples, and so do
    other ways in: a table that took a norm over holds what the norm made of its rows, which ``inputs_embeds`` must then
    be, too.

    Beyond the copy it returns, this takes the memory of the activations and of one layer in float64.

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
    copied = copy_model(model)
    return copied, _fuse(copied, find_norms(copied), examples, keep, outputs, fixed_size, untie)


@makes_ordinary_tensors
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
    store: Callable[[Tensor], Tensor] | None = None,
) -> FuseReport:
    """:func:`fuse` in place: the same arguments and errors, all raised before anything changes; returns the report.

    Args:
        model: Changed.
        example_inputs: As for :func:`fuse`, and so are the others.
        example_kwargs: See there.
        keep: See there.
        outputs: See there.
        fixed_size: See there.
        untie: See there.
        allow_gamma: See there.
        store: Given every new value of a parameter in the dtype of the parameter, layer by layer, it returns the tensor
            to keep: the same values, in a mapped file for example, where a model's new weights do not fit into memory.
    """
    norms = check_model(model, allow_gamma)
    check_not_compiled(model)
    examples = check_examples(example_inputs, example_kwargs)
    return _fuse(model, norms, examples, keep, outputs, fixed_size, untie, store)


def _fuse(
    model: nn.Module,
    norms: Sequence[Norm],
    inputs: Sequence[Example],
    keep: str | Sequence[str],
    outputs: OutputLike | Sequence[OutputLike],
    fixed_size: bool,
    untie: bool,
    store: Callable[[Tensor], Tensor] | None = None,
) -> FuseReport:
    """Ask what must stay, propose, try, and only then change ``model``."""
    wanted = Wanted.of(model, norms, keep, outputs)
    examples = wanted.examples(inputs)
    wanted.rehearse(examples)
    untied = Untied(model) if untie else None
    trial = Trial(model, norms, examples)
    plan = propose(model, norms, examples, fixed_size, untied)
    solution = trial.settle(plan)
    other = None if fixed_size or len(inputs) > 1 else at_another_size(inputs[0])
    if other is not None and is_refuted_by(model, norms, wanted.examples([other]), plan):
        inputs = [*inputs, other]
        examples = wanted.examples(inputs)
        plan = propose(model, norms, examples, fixed_size, untied)
        solution = Trial(model, norms, examples).settle(plan)
    if untied is not None:
        untied.put_together(solution.names)
    changed = changed_methods(*trial.before_and_after(solution, plan), trial.examples[0])
    _let_go_of_copies(model)
    commit(model, solution, plan.untouchable, store)
    if untied is not None:
        note_untied_(model)
    if fixed_size:
        fix_size_(model, [sizes_of(example) for example in inputs])
    report = FuseReport(plan.outcomes(norms), shapes_of(inputs), staying_norms(model), changed)
    logger.debug("%s: %s", type(model).__name__, report.summary())
    return report


def _let_go_of_copies(model: nn.Module) -> None:
    """Free the copies of a large model that were traced and tried: until then its old weights stay beside the new.

    They share its weights, and graphs and modules stand in circles, which Python frees at its leisure.
    """
    if sum(parameter.nbytes for parameter in model.parameters()) >= LARGE:
        gc.collect()
