"""Bring linear attention near the softmax attention that it replaced, layer by layer (stage 1 of arXiv 2603.16063)."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.settings import NonNegativeInt, PositiveFloat, PositiveInt, checked
from slabformer.surgery.attention_start import Pairs, captured, mean_errors, relative_error, start_, teacher_of
from slabformer.surgery.batches import NO_BATCH, call_model, eval_mode, model_device, to_device

logger = logging.getLogger(__name__)


@checked
def align_attention_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    fit_batches: PositiveInt = 2,
    steps: NonNegativeInt = 100,
    lr: PositiveFloat = 3e-4,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """Bring every converted attention near the one that it replaced, each for itself, on the teacher's activations.

    First a start in closed form: the depthwise branch by least squares against what linear attention misses, and the
    place of the keys' ReLU by trying a few. Then ``steps`` of AdamW on each attention's own squared error. One forward
    of the teacher a batch serves all of them; no gradient leaves an attention. Memory: inputs and heads of every
    attention on the batches of the start, or on one batch of training.

    Args:
        model: Converted by :func:`convert_attention_`; edited in place.
        teacher: The model before it was converted.
        batches: As for :func:`slabformer.recalibrate_`; begun anew where they end before ``steps``, if they can be.
        fit_batches: Batches that the start uses.
        steps: Batches that are trained on after it; 0 for the start alone.
        lr: Highest rate of AdamW, which falls to 0 by a cosine.
        forward: As for :func:`slabformer.recalibrate_`.

    Returns:
        For each attention the squared error of its output over the variance of the teacher's, on the batches of the
        start; where there are class tokens or others in front, the mean of theirs and of the image's. Where training
        did not lower it, the attention keeps its start.

    Raises:
        ValueError: If the model has no converted attention, the teacher has none under such a name, or there is no
            batch.
    """
    students = {n: m for n, m in model.named_modules() if isinstance(m, ConvertedLinearAttention)}
    if not students:
        raise ValueError("the model has no converted attention; call convert_attention_(model) first")
    pairs = {name: (student, teacher_of(teacher, name, student)) for name, student in students.items()}
    if isinstance(batches, Iterator):
        batches = list(itertools.islice(batches, fit_batches + steps))
    seen = list(itertools.islice(batches, fit_batches))
    if not seen:
        raise ValueError(NO_BATCH)
    device, call = model_device(teacher), forward or call_model
    with eval_mode(model), eval_mode(teacher):
        captures = [captured(teacher, pairs, call, to_device(batch, device)) for batch in seen]
        for name, (student, _) in pairs.items():
            start_(student, [capture[name] for capture in captures])
        errors = mean_errors(pairs, captures)
        if not steps:
            return errors
        started = {name: copy.deepcopy(student.state_dict()) for name, (student, _) in pairs.items()}
        _train(pairs, teacher, call, itertools.islice(_endless(batches), steps), steps, lr, device)
        trained = mean_errors(pairs, captures)
        for name in [name for name, error in trained.items() if not error <= errors[name]]:
            pairs[name][0].load_state_dict(started[name])
            logger.warning("training brought %s no nearer to its teacher: it keeps its start; lower lr", name)
        return {name: min(error, errors[name]) for name, error in trained.items()}


def _train(
    pairs: Pairs,
    teacher: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    steps: int,
    lr: float,
    device: torch.device,
) -> None:
    parameters = [p for student, _ in pairs.values() for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches:
        seen = captured(teacher, pairs, call, to_device(batch, device))
        with torch.enable_grad():
            errors = torch.stack([relative_error(*pair, seen[name]) for name, pair in pairs.items()])
            gradients = torch.autograd.grad(errors.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            return
