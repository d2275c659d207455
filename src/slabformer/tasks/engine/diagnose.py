"""After a non-finite step: run its batches again and say which module, which samples, and what is safe."""

from __future__ import annotations

from functools import partial
from typing import Any

from slabformer.tasks.engine.devices import first_of_ranks, to_device
from slabformer.tasks.engine.nonfinite import first_nonfinite_module, tensors_in
from slabformer.tasks.engine.parts import windows
from slabformer.tasks.engine.seeds import reseed
from slabformer.tasks.engine.training import Training

MOST_NAMES = 8


def describe_nonfinite(training: Training, step: int) -> str:
    """One line about optimizer step ``step`` (counted from 0) of this epoch, which gave a NaN or an infinity.

    The step's batches are fetched and run again with the same random numbers, in the same mode, without moving
    statistics, on every rank by itself: the message is that of the first rank that finds the culprit. Where the step
    has been taken since (an accelerator is only asked now and then), its weights are gone and those of the last
    checkpoint are used.
    """
    safe = training.store.load_latest() if training.store is not None else None
    if safe is not None and step < training.position.step:
        training.model.load_state_dict(safe[1]["model"])
    start = (step - training.position.epoch * training.steps_per_epoch) * training.config.accumulate
    where = f"step {step + 1} (epoch {training.position.epoch + 1}, batch {start + 1})"
    kept = f"; the last good checkpoint is {safe[0]}" if safe is not None else "; there is no checkpoint yet"
    try:
        culprit = _culprit(training, step, start)
    except Exception as error:  # whatever the model makes of such values; the other ranks wait for this one's answer
        culprit = f"running it again failed with {type(error).__name__}: {error}"
    found = first_of_ranks(culprit)
    if found is None:
        names = _names(training, *range(start, min(start + training.config.accumulate, training.batches_per_epoch)))
        found = f"every module's output is finite when run again, so it was the loss itself or the backward pass{names}"
    return f"the loss or its gradient became non-finite in {where}: {found}{kept}"


def _culprit(training: Training, step: int, start: int) -> str | None:
    training.loader.set_epoch(training.position.epoch)
    training.loader.set_start(start)
    reseed(training.config.seed, step, training.accelerator.process_index)
    window = next(windows(training.loader, training.config.accumulate))
    for index, batch in enumerate(window, start):
        if not all(bool(t.isfinite().all()) for t in tensors_in(batch) if t.is_floating_point()):
            return f"the batch itself is not finite{_names(training, index)}"
        name = first_nonfinite_module(training.model, partial(_run, training, batch))
        if name is not None:
            return f"first in the output of {name}{_names(training, index)}"
    return None


def _run(training: Training, batch: Any) -> None:
    with training.accelerator.autocast():
        training.step_fn(training.model, to_device(batch, training.accelerator.device))


def _names(training: Training, *batches: int) -> str:
    names = [name for index in batches for name in training.batch_names(index)] if training.batch_names else []
    if not names:
        return ""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f", on {', '.join(names[:MOST_NAMES])}{more}"
