"""A training run from its folder to its result: open or go on, train, finish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import nn

from slabformer.surgery.recalibrate import recalibrate_
from slabformer.tasks.engine.config import RecalibrateConfig, RunConfig
from slabformer.tasks.engine.devices import told_to_all
from slabformer.tasks.engine.folder import Found, RunFolder
from slabformer.tasks.engine.loop import Trainer
from slabformer.tasks.engine.observers import CsvObserver, Observer, TensorBoardObserver

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
Result = TypeVar("Result", covariant=True)
Folder = TypeVar("Folder", bound=RunFolder)


class Run(Protocol[Result]):
    """What a task brings to a session."""

    @property
    def config(self) -> RunConfig:
        """The recipe."""

    @property
    def folder(self) -> RunFolder:
        """Where the run writes."""

    @property
    def accelerator(self) -> Accelerator:
        """Device, precision and ranks."""

    def trainer(self, observers: Sequence[Observer]) -> Trainer:
        """The loop with everything that the recipe gives it."""

    def finish(self, trainer: Trainer) -> Result:
        """What comes after the last step, on every rank."""


def open_folder(config: RunConfig, folder_type: type[Folder]) -> tuple[Folder, Found]:
    """The folder of the run that ``config`` describes, and what is in it; nothing is written.

    Raises:
        ValueError: If another run is in it, or any at all where ``config.resume`` is "never".
        FolderInUseError: If another process writes to it.
        NotADirectoryError: If something else is in its place.
    """
    folder = folder_type(Path(config.output), config.to_dict(), config.harmless())
    folder.refuse_if_taken()
    found = "new" if config.overwrite else folder.look()
    if config.resume == "never" and found != "new":
        raise ValueError(f"{config.output} holds a run already; pass --overwrite true, or --resume auto to go on")
    return folder, found


def train_and_finish(run: Run[Result], csv: CsvObserver, observers: Sequence[Observer]) -> Result:
    """Claim the folder, go on from the newest checkpoint, train to the end, and :meth:`Run.finish`.

    Args:
        run: What is trained.
        csv: The files of figures that the run keeps.
        observers: Told how training goes beside them, on the main process.

    Raises:
        NonFiniteError: If the loss, a gradient or a weight is NaN or infinite; the last good checkpoint stays.
        StoppedError: After SIGTERM or SIGINT, once a checkpoint is written.
        FolderInUseError: If another process writes to the folder.
        OSError: If the disk is full or not writable.
    """
    watchers: list[Observer] = [csv, *observers]
    if run.config.tensorboard:
        watchers.append(TensorBoardObserver(run.folder.path, run.folder.record))
    trainer = run.trainer(watchers)
    with ExitStack() as stack:
        with told_to_all():
            if run.accelerator.is_main_process:
                stack.enter_context(run.folder.claimed(run.config.overwrite))
                run.folder.record(csv.epochs.path.name, csv.steps.path.name)
                for observer in watchers:
                    stack.callback(observer.on_end)
        checkpoint = trainer.resume()
        if checkpoint is not None and run.accelerator.is_main_process:
            logger.info("going on from %s", checkpoint)
        stack.enter_context(trainer.signals)
        trainer.fit()
        return run.finish(trainer)


def recalibrate_after(
    trainer: Trainer, norms: nn.Module, config: RecalibrateConfig, forward: Callable[[nn.Module, Any], object]
) -> None:
    """Give ``norms`` the statistics of one more epoch's training batches, augmented as in training, as published.

    Args:
        trainer: At the end of training.
        norms: A model, or those of its norms whose statistics move.
        config: How many batches.
        forward: Runs the norms on a batch.
    """
    loader = trainer.loader
    loader.set_epoch(trainer.config.epochs)
    loader.set_start(0)
    progress = trainer.progress("recalibrate", min(config.batches or len(loader), len(loader)))

    def step(norms: nn.Module, batch: Any) -> None:
        forward(norms, batch)
        progress()

    recalibrate_(norms, loader, config.batches, step)
