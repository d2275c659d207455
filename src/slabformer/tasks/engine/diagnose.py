"""After a non-finite step: run its batches again and say which module, which samples, and what is safe."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from slabformer.tasks.engine.devices import to_device
from slabformer.tasks.engine.nonfinite import first_nonfinite_module, tensors_in
from slabformer.tasks.engine.parts import windows
from slabformer.tasks.engine.seeds import reseed

if TYPE_CHECKING:
    from slabformer.tasks.engine.loop import Trainer

MOST_NAMES = 8


def describe_nonfinite(trainer: Trainer, step: int) -> str:
    """One line about optimizer step ``step`` (counted from 0) of this epoch, which gave a NaN or an infinity.

    The step's batches are fetched and run again with the same random numbers, in the same mode, without moving
    statistics. Where the step has been taken since (an accelerator is only asked now and then), its weights are gone
    and those of the last checkpoint are used.
    """
    safe = trainer.store.load_latest() if trainer.store is not None else None
    if safe is not None and step < trainer.position.step:
        trainer.model.load_state_dict(safe[1]["model"])
    start = (step - trainer.position.epoch * trainer.steps_per_epoch) * trainer.config.accumulate
    where = f"step {step + 1} (epoch {trainer.position.epoch + 1}, batch {start + 1})"
    kept = f"; the last good checkpoint is {safe[0]}" if safe is not None else "; there is no checkpoint yet"
    return f"the loss or its gradient became non-finite in {where}: {_culprit(trainer, step, start)}{kept}"


def _culprit(trainer: Trainer, step: int, start: int) -> str:
    trainer.loader.set_epoch(trainer.position.epoch)
    trainer.loader.set_start(start)
    reseed(trainer.config.seed, step, trainer.accelerator.process_index)
    window = next(windows(trainer.loader, trainer.config.accumulate))
    for index, batch in enumerate(window, start):
        if not all(bool(t.isfinite().all()) for t in tensors_in(batch) if t.is_floating_point()):
            return f"the batch itself is not finite{_names(trainer, index)}"
        name = first_nonfinite_module(trainer.model, partial(_run, trainer, batch))
        if name is not None:
            return f"first in the output of {name}{_names(trainer, index)}"
    names = _names(trainer, *range(start, start + len(window)))
    return f"every module's output is finite when run again, so it was the loss itself or the backward pass{names}"


def _run(trainer: Trainer, batch: Any) -> None:
    with trainer.accelerator.autocast():
        trainer.step_fn(trainer.model, to_device(batch, trainer.accelerator.device))


def _names(trainer: Trainer, *batches: int) -> str:
    names = [name for index in batches for name in trainer.batch_names(index)] if trainer.batch_names else []
    if not names:
        return ""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f", on {', '.join(names[:MOST_NAMES])}{more}"
