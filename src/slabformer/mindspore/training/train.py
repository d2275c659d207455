"""Train a classifier in MindSpore while its LayerNorm fades out, by a recipe of `slab train`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import slabformer as sf
from slabformer.mindspore.convert import convert, runtime_of
from slabformer.mindspore.files import load, state_of
from slabformer.mindspore.runtime import graph_mode, require
from slabformer.mindspore.training.data import TrainingBatches, training_dataset, whole_batches
from slabformer.mindspore.training.recipe import check_recipe
from slabformer.nn.controls import repbn_modules
from slabformer.tasks.classification.build import build_model, check_model, info_of
from slabformer.tasks.classification.config import TrainConfig
from slabformer.tasks.classification.data import Loader, create_loader
from slabformer.tasks.classification.evaluate import evaluate
from slabformer.tasks.classification.mixup import MixedStep
from slabformer.tasks.classification.result import COLUMNS
from slabformer.tasks.engine.build import (
    build_gamma_schedule,
    build_lr_schedule,
    build_optimizer,
    check_optimizer,
    rate_scale,
)
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.folder import RunFolder, fingerprint, refuse_difference
from slabformer.tasks.engine.observers import CsvObserver, Observer, TensorBoardObserver
from slabformer.tasks.engine.process import leaves_the_process_alone
from slabformer.tasks.engine.seeds import reseed
from slabformer.tasks.engine.session import open_folder
from slabformer.tasks.engine.signals import StopSignals
from slabformer.tasks.saved_model import save_model

if TYPE_CHECKING:
    from slabformer.mindspore.training.callbacks import RunCallback
    from slabformer.mindspore.training.state import Parts

logger = logging.getLogger(__name__)
#: recipe's precision -> the type that ``mindspore.amp`` computes in, level "auto"
HALVES = {"bf16": "bfloat16", "fp16": "float16"}
#: of a loss in float16, constant
LOSS_SCALE = 1024.0


class MindSporeFolder(RunFolder):
    """The folder of a run in MindSpore, which `slab train` does not go on with."""

    OUTPUTS = (*RunFolder.OUTPUTS, *(f"{name}{suffix}" for name in ("model", "ema") for suffix in (".py", ".ckpt")))
    WRITER = "run of `slab mindspore train`"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What :func:`train` leaves, beside the files.

    Attributes:
        metrics: Of the recalibrated model: top1, loss, top5 with five classes or more; ema_* alike.
        output: Folder of the run.
        already_finished: Nothing was trained: the run in ``output`` was complete.
    """

    metrics: dict[str, float]
    output: Path
    already_finished: bool = False


@leaves_the_process_alone
def train(config: TrainConfig, *, observers: Sequence[Observer] = ()) -> TrainResult:
    """Train as ``config`` says, in graph mode, or go on with the run in ``config.output``.

    The folder holds what `slab train` writes; at the end also ``model.py`` and ``model.ckpt``, verified against torch.

    Args:
        config: The recipe.
        observers: Told how training goes, on the first process.

    Raises:
        ValueError: If a setting has no counterpart, or the recipe does not fit the data or the run in the folder.
        ImportError: If MindSpore is missing, or beside a NumPy that it cannot take.
        NonFiniteError: If the loss, a gradient or a weight is NaN or infinite; the last good checkpoint stays.
        StoppedError: After SIGTERM or SIGINT, once a checkpoint is written.
    """
    check_recipe(config)
    require()
    folder, found = open_folder(config, MindSporeFolder)
    if found == "finished":
        logger.info("%s is finished already; --overwrite true starts again", folder.path)
        return TrainResult(metrics=folder.result(), output=folder.path, already_finished=True)
    optimizer = check_optimizer(config.optimizer)
    build_lr_schedule(config.lr_schedule, optimizer, epochs=config.epochs, steps_per_epoch=1, scale=1.0)
    if found == "new":
        check_model(config.model, config.data.image_size)
    with graph_mode(config.device), ExitStack() as stack:
        return _Run(config, folder, stack, fresh=found == "new").train(observers)


class _Run:
    """One run's parts."""

    def __init__(self, config: TrainConfig, folder: RunFolder, stack: ExitStack, *, fresh: bool) -> None:
        self.config, self.folder, self.stack = config, folder, stack
        self.rank, self.processes = join_processes()
        self.train_loader, self.val_loader = self._loader("train"), self._loader("validation")
        self.class_names = self.train_loader.class_names
        self.num_classes = len(self.class_names)
        self.mixed = MixedStep(config.augment, self.num_classes, config.batch_size)
        reseed(config.seed)
        self.model, self.model_args = build_model(config.model, self.num_classes, config.data.image_size)
        if config.gamma.fit_batches and fresh:
            sf.fit_norms_(self.model, self.train_loader, config.gamma.fit_batches)
        self.parts, self.epochs = self._parts()

    def _loader(self, split: Any) -> Loader:
        config = self.config
        return create_loader(
            config.data,
            config.augment,
            split,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=self.rank if split == "train" else 0,
            world_size=self.processes if split == "train" else 1,
            num_workers=config.num_workers,
        )

    def _images(self) -> torch.Tensor:
        size = self.config.data.image_size
        return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(self.config.seed))

    def _parts(self) -> tuple[Parts, int]:
        """The model in MindSpore with its step, and the number of epochs."""
        from slabformer.mindspore.training.state import Parts, averaged_parameters
        from slabformer.mindspore.training.step import AdamW, Average, Group, TrainStep

        config, total_batch = self.config, self.config.batch_size * self.processes
        optimizer = build_optimizer(config.optimizer, self.model, total_batch)
        lr_schedule, epochs = build_lr_schedule(
            config.lr_schedule,
            optimizer,
            epochs=config.epochs,
            steps_per_epoch=len(self.train_loader),
            scale=rate_scale(config.optimizer, total_batch),
        )
        gamma_schedule = build_gamma_schedule(config.gamma, self.model, optimizer, epochs * len(self.train_loader))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = [
            Group([names[parameter] for parameter in group["params"]], group["weight_decay"], *_moments_of(group))
            for group in optimizer.param_groups
        ]
        # MindSpore reads the source when it compiles
        place = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="slabformer-mindspore-"))
        self.model.eval()
        cell = convert(self.model, self._images(), place, name="model").cell
        if cell.inference_only:
            raise ValueError(f"{config.model.name} cannot be trained in MindSpore: it has {cell.inference_only}")
        half = HALVES.get(config.precision)
        mindspore = require()
        trained = cell if half is None else mindspore.amp.auto_mixed_precision(cell, "auto", getattr(mindspore, half))
        step = TrainStep(
            trained,
            AdamW(cell.trainable_params(), groups),
            Average(averaged_parameters(cell)) if config.ema.decay > 0 else None,
            config.optimizer.clip_norm,
            mindspore.nn.DistributedGradReducer(cell.trainable_params()) if self.processes > 1 else None,
        )
        if config.precision == "fp16":
            step.loss_scale.set_data(mindspore.Tensor(LOSS_SCALE, dtype=mindspore.float32))
        told = {**fingerprint(config.to_dict(), config.harmless()), "framework": "mindspore"}
        parts = Parts(
            cell=cell,
            step=step,
            model=self.model,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            gamma_schedule=gamma_schedule,
            fingerprint={**told, "processes": self.processes},
        )
        return parts, epochs

    def train(self, observers: Sequence[Observer]) -> TrainResult:
        """Claim the folder, go on from the newest checkpoint, train to the end, and finish."""
        from slabformer.mindspore.training.callbacks import RunCallback

        main, store = self.rank == 0, CheckpointStore(self.folder.path, self.config.keep, self.folder.record)
        csv = CsvObserver(self.folder.path, COLUMNS)
        watchers: list[Observer] = [csv, *observers] if main else []
        if main and self.config.tensorboard:
            watchers.append(TensorBoardObserver(self.folder.path, self.folder.record))
        if main:
            self.stack.enter_context(self.folder.claimed(self.config.overwrite))
            self.folder.record(csv.epochs.path.name, csv.steps.path.name)
        for observer in watchers:
            self.stack.callback(observer.on_end)
        self._resume(store)
        signals = self.stack.enter_context(StopSignals())
        run = RunCallback(
            self.config,
            self.parts,
            store if main else None,
            signals,
            watchers,
            self._evaluate,
            lambda: self._save_best() if main else None,
            epochs=self.epochs,
            steps_per_epoch=len(self.train_loader),
            processes=self.processes,
        )
        self._fit(run)
        return self._finish(run, main)

    def _resume(self, store: CheckpointStore) -> None:
        from slabformer.mindspore.training.state import restore

        found = store.load_latest()
        if found is None:
            return
        path, state = found
        refuse_difference(state.get("fingerprint", {}), self.parts.fingerprint, f"{path} belongs to another run")
        restore(self.parts, state)
        logger.info("going on from %s", path)

    def _fit(self, run: RunCallback) -> None:
        """Train until the last epoch is done and evaluated."""
        parts = self.parts
        run.announce()
        if parts.position.batch >= len(self.train_loader):  # stopped between an epoch's last step and its evaluation
            run.on_train_epoch_end(None)
        if parts.position.batch:
            self._train_epochs(1, run)
        if parts.position.epoch < self.epochs:
            self._train_epochs(self.epochs - parts.position.epoch, run)

    def _train_epochs(self, count: int, run: RunCallback) -> None:
        """Train ``count`` epochs from where training is."""
        from slabformer.mindspore.training.callbacks import ScheduleCallback

        parts = self.parts
        batches = TrainingBatches(
            self.train_loader,
            self.mixed,
            self.num_classes,
            self.config.augment.label_smoothing,
            seed=self.config.seed,
            rank=self.rank,
            epoch=parts.position.epoch,
            batch=parts.position.batch,
        )
        fade = [] if parts.gamma_schedule is None else [ScheduleCallback(parts.gamma_schedule, parts)]
        try:
            # counted from 0: MindSpore would read further epochs ahead if it were told of those before
            require().train.Model(parts.step).train(
                count, training_dataset(batches), callbacks=[*fade, run], dataset_sink_mode=False
            )
        except Exception:
            if batches.error is not None:  # MindSpore tells of it in pages of its own
                raise batches.error from None
            raise

    def _evaluate(self) -> dict[str, float]:
        metrics = self._metrics("")
        if self.parts.step.average is not None:
            from slabformer.mindspore.training.state import averaged_state, holding

            with holding(self.parts.cell, averaged_state(self.parts)):
                metrics |= self._metrics("ema_")
        self.parts.step.set_train(True)
        return metrics

    def _metrics(self, prefix: str, progress: Callable[..., None] | None = None) -> dict[str, float]:
        """Of the deployed form of what the cell holds."""
        self.parts.cell.set_train(False)
        run = runtime_of(self.parts.cell)
        run.run = whole_batches(run.run, self.config.batch_size)
        result = evaluate(run, self.val_loader, progress=progress)
        values = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
        return {f"{prefix}{name}": value for name, value in values.items() if value is not None}

    def _finish(self, run: RunCallback, main: bool) -> TrainResult:
        """Recalibrate, evaluate and save model and average."""
        from slabformer.mindspore.training.recalibrate import recalibrate
        from slabformer.mindspore.training.state import averaged_state

        metrics: dict[str, float] = {}
        states = {"model": state_of(self.parts.cell)}
        if self.parts.step.average is not None:
            states["ema"] = averaged_state(self.parts)
        for name, state in states.items():
            load(self.parts.cell, state)
            if self.config.recalibrate.enabled and repbn_modules(self.model):
                loader = self.train_loader
                loader.set_epoch(self.epochs)
                loader.set_start(0)
                recalibrate(self.parts.cell, self.model, loader, self.config.recalibrate.batches, run.stop_if_asked)
            metrics |= self._metrics("" if name == "model" else f"{name}_")
            if main:
                self._save(name)
        if main:
            self.folder.finish(metrics)
        return TrainResult(metrics=metrics, output=self.folder.path)

    def _save_best(self) -> None:
        self._save_torch("best")

    def _save(self, name: str) -> None:
        """For torch, and for MindSpore: there verified against torch."""
        self._save_torch(name)
        self.folder.record(f"{name}.py", f"{name}.ckpt")
        convert(self.model, self._images(), self.folder.path, name=name)

    def _save_torch(self, name: str) -> None:
        self.model.load_state_dict(state_of(self.parts.cell))
        info = info_of(self.config, self.model_args, self.class_names)
        self.folder.record(f"{name}.safetensors")
        save_model(self.model, self.folder.path / f"{name}.safetensors", info)


def join_processes() -> tuple[int, int]:
    """Rank and number of processes, where ``msrun`` started several; data is then shared out between them."""
    import os

    processes = int(os.environ.get("RANK_SIZE") or os.environ.get("MS_WORKER_NUM") or "1")
    if processes == 1:
        return 0, 1
    mindspore = require()
    mindspore.communication.init()
    rank, processes = mindspore.communication.get_rank(), mindspore.communication.get_group_size()
    mindspore.set_auto_parallel_context(
        parallel_mode=mindspore.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=processes, global_rank=rank
    )
    return rank, processes


def _moments_of(group: dict[str, Any]) -> tuple[tuple[float, float], float]:
    first, second = group["betas"]
    return (first, second), group["eps"]
