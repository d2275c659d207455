"""Train a classifier while its LayerNorm fades out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

import slabformer as sf
from slabformer.nn.controls import repbn_modules
from slabformer.tasks.classification.build import build_model, check_model, info_of, model_arguments
from slabformer.tasks.classification.config import TrainConfig
from slabformer.tasks.classification.data import Batch, Loader, create_loader
from slabformer.tasks.classification.evaluate import evaluate
from slabformer.tasks.classification.mixup import MixedStep
from slabformer.tasks.classification.result import COLUMNS, TrainResult, finished_before, read_history
from slabformer.tasks.classification.sources import holds_images_alone
from slabformer.tasks.classification.teaching import (
    TaughtLabels,
    TaughtStep,
    classes_without_labels,
    create_distiller,
    load_teacher,
)
from slabformer.tasks.engine.build import (
    build_gamma_schedule,
    build_loop_config,
    build_lr_schedule,
    build_optimizer,
    check_accumulate,
    check_optimizer,
    rate_scale,
)
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.devices import create_accelerator
from slabformer.tasks.engine.ema import ModelEma
from slabformer.tasks.engine.folder import RunFolder, fingerprint
from slabformer.tasks.engine.loop import Trainer
from slabformer.tasks.engine.observers import CsvObserver, Observer
from slabformer.tasks.engine.process import leaves_the_process_alone
from slabformer.tasks.engine.seeds import reseed
from slabformer.tasks.engine.session import open_folder, recalibrate_after, train_and_finish
from slabformer.tasks.rounding import check_torchao, fold, round_linears_, without_rounding
from slabformer.tasks.saved_model import save_model

logger = logging.getLogger(__name__)


@leaves_the_process_alone
def train(config: TrainConfig, *, model: nn.Module | None = None, observers: Sequence[Observer] = ()) -> TrainResult:
    """Train as ``config`` says, or go on with the run in ``config.output``.

    The folder then holds ``config.yaml``, ``metrics.csv``, ``steps.csv``, TensorBoard events, the last checkpoints,
    ``best.safetensors`` (highest top-1 among the epochs with gamma 0) and at the end ``model.safetensors``,
    ``ema.safetensors`` and ``result.json``.

    Args:
        config: The recipe.
        model: Trained instead of what ``config.model`` builds, which must still describe it: name and arguments are
            saved with the weights. Build and convert it the same way when a run goes on.
        observers: Told how training goes, on the main process.

    Raises:
        ValueError: If the recipe does not fit the data, the model or the run in the folder.
        NonFiniteError: If the loss, a gradient or a weight is NaN or infinite; the last good checkpoint stays.
        StoppedError: After SIGTERM or SIGINT, once a checkpoint is written.
        OSError: If the disk is full or not writable.
    """
    if config.teacher is not None and config.data.labels and holds_images_alone(config.data):
        config = replace(config, data=replace(config.data, labels=False))
    folder, found = open_folder(config, RunFolder)
    if found == "finished":
        return finished_before(folder)
    optimizer = check_optimizer(config.optimizer)
    build_lr_schedule(config.lr_schedule, optimizer, epochs=config.epochs, steps_per_epoch=1, scale=1.0)
    if config.qat.enabled:
        check_torchao()
    if found == "new" and model is None:
        check_model(config.model, config.data.image_size)
    run = _Run(config, folder, model, fresh=found == "new")
    return train_and_finish(run, CsvObserver(folder.path, COLUMNS, run.step_parts), observers)


class _Run:
    """One run's parts."""

    def __init__(self, config: TrainConfig, folder: RunFolder, model: nn.Module | None, *, fresh: bool) -> None:
        self.config, self.folder = config, folder
        self.accelerator = create_accelerator(config.precision, config.device)
        teacher = load_teacher(config)
        self.train_loader, self.val_loader = self._loader("train"), self._loader("validation")
        check_accumulate(config.accumulate, len(self.train_loader))
        self.class_names = self.train_loader.class_names
        self.num_classes = len(self.class_names)
        if not config.data.labels:
            self.num_classes, self.class_names = classes_without_labels(config, teacher)
        reseed(config.seed)
        needed = (config.model, self.num_classes, config.data.image_size)
        self.model, self.model_args = build_model(*needed) if model is None else (model, model_arguments(*needed))
        if config.qat.enabled:
            self.model = round_linears_(fold(self.model, torch.zeros(2, 3, *2 * [config.data.image_size])))
        self.model.to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            sf.sync_norms_(self.model)
        self.distiller = create_distiller(config, self.model, teacher) if config.teacher is not None else None
        if config.gamma.fit_batches and fresh:
            sf.fit_norms_(self.model, self.train_loader, config.gamma.fit_batches)
        self.step_fn = self._step_fn()

    def _step_fn(self) -> MixedStep | TaughtStep:
        config = self.config
        mixed = MixedStep(config.augment, self.num_classes, config.batch_size)
        if self.distiller is None:
            return mixed
        weight = config.distill.label_weight
        return TaughtStep(self.distiller, mixed, float(config.data.labels) if weight is None else weight)

    def _loader(self, split: str) -> Loader:
        config = self.config
        return create_loader(
            config.data,
            config.augment,
            split,  # type: ignore[arg-type]
            batch_size=config.batch_size,
            seed=config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=config.num_workers,
        )

    @property
    def step_parts(self) -> list[str]:
        """Names of what the loss is the sum of, where it is one."""
        return self.step_fn.parts if isinstance(self.step_fn, TaughtStep) else []

    def trainer(self, observers: Sequence[Observer]) -> Trainer:
        """The loop with everything that this recipe gives it."""
        config = self.config
        total_batch = config.batch_size * self.accelerator.num_processes * config.accumulate
        optimizer = build_optimizer(config.optimizer, self.model, total_batch)
        steps_per_epoch = -(-len(self.train_loader) // config.accumulate)
        lr_schedule, epochs = build_lr_schedule(
            config.lr_schedule,
            optimizer,
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            scale=rate_scale(config.optimizer, total_batch),
        )
        return Trainer(
            accelerator=self.accelerator,
            model=self.model,
            optimizer=optimizer,
            loader=self.train_loader,
            step_fn=self.step_fn,
            config=build_loop_config(
                config, epochs=epochs, clip_norm=config.optimizer.clip_norm, compile=config.compile
            ),
            store=CheckpointStore(self.folder.path, config.keep, self.folder.record),
            lr_schedule=lr_schedule,
            gamma_schedule=build_gamma_schedule(config.gamma, self.model, optimizer, epochs * steps_per_epoch),
            ema=ModelEma(self.model, config.ema.decay, config.ema.warmup) if config.ema.decay > 0 else None,
            evaluate=self._evaluate,
            best_metric="top1",
            on_best=lambda trainer: self._save(trainer.model, "best"),
            batch_names=self._batch_names,
            observers=observers,
            fingerprint={
                **fingerprint(config.to_dict(), config.harmless()),
                "processes": self.accelerator.num_processes,
                **({} if self.distiller is None else {"teacher weights": self.distiller.teacher.digest()}),
            },
        )

    def _batch_names(self, batch_index: int) -> list[str]:
        """What the data calls the images of a training batch of the epoch that was set."""
        self.train_loader.set_start(batch_index)
        indices = self.train_loader.order.take()[0]
        dataset = getattr(getattr(self.train_loader, "loader", None), "dataset", None)
        return [dataset.source.name(index) if dataset is not None else f"image {index}" for index in indices.tolist()]

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        metrics = self._metrics(trainer, trainer.model, "")
        if trainer.gamma > 0:
            with sf.blended(trainer.model):
                metrics |= self._metrics(trainer, trainer.model, "blend_")
        if trainer.ema is not None:
            metrics |= self._metrics(trainer, trainer.ema.module, "ema_")
        return metrics

    def _metrics(self, trainer: Trainer, model: nn.Module, prefix: str) -> dict[str, float]:
        progress = trainer.progress(f"{prefix}evaluate".replace("_", " "), len(self.val_loader))
        result = evaluate(model, self._judged(), accelerator=self.accelerator, progress=progress)
        values = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
        return {f"{prefix}{name}": value for name, value in values.items() if value is not None}

    def _judged(self) -> Iterable[Batch]:
        """Validation images with their labels, or with the teacher's where they have none."""
        if self.config.data.labels:
            return self.val_loader
        assert self.distiller is not None
        return TaughtLabels(self.val_loader, self.distiller.teacher, self.num_classes)

    def finish(self, trainer: Trainer) -> TrainResult:
        """Recalibrate, evaluate and save model and average."""
        metrics: dict[str, float] = {}
        models = {"model": trainer.model, **({"ema": trainer.ema.module} if trainer.ema is not None else {})}
        for name, model in models.items():
            if self.config.recalibrate.enabled and repbn_modules(model):
                recalibrate_after(trainer, model, self.config.recalibrate, lambda model, batch: model(batch[0]))
            metrics |= self._metrics(trainer, model, "" if name == "model" else f"{name}_")
            if self.accelerator.is_main_process:
                self._save(model, name)
            model.eval()
        if self.accelerator.is_main_process:
            self.folder.finish(metrics)
        self.accelerator.wait_for_everyone()
        return TrainResult(
            model=self._shipped(trainer.model),
            ema=self._shipped(models["ema"]) if "ema" in models else None,
            history=read_history(self.folder.path),
            metrics=metrics,
            output=self.folder.path,
        )

    def _shipped(self, model: nn.Module) -> nn.Module:
        """As it is saved."""
        return without_rounding(model) if self.config.qat.enabled else model

    def _save(self, model: nn.Module, name: str) -> None:
        info = info_of(self.config, self.model_args, self.class_names)
        self.folder.record(f"{name}.safetensors")
        save_model(self._shipped(model), self.folder.path / f"{name}.safetensors", info)
