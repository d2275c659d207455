"""Train a detector while its backbone's LayerNorm fades out, or without any."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer.tasks.detection.build import (
    backbone_args,
    build_fading,
    build_model,
    check_model,
    decay_groups,
    live_norms,
)
from slabformer.tasks.detection.config import Split, TrainConfig
from slabformer.tasks.detection.cost import refuse_slow_cpu
from slabformer.tasks.detection.evaluate import evaluate, flat
from slabformer.tasks.detection.loader import DetectionBatch, DetectionLoader, create_loader
from slabformer.tasks.detection.rate import RateSchedule
from slabformer.tasks.detection.result import (
    BOX_LOSSES,
    COLUMNS,
    MASK_LOSSES,
    TrainResult,
    finished_before,
    read_history,
)
from slabformer.tasks.detection.saved import DetectorInfo, save_detector
from slabformer.tasks.engine.build import build_loop_config, build_optimizer, check_accumulate, check_optimizer
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.devices import create_accelerator, to_device
from slabformer.tasks.engine.folder import RunFolder, fingerprint
from slabformer.tasks.engine.loop import Trainer
from slabformer.tasks.engine.observers import CsvObserver, Observer
from slabformer.tasks.engine.process import leaves_the_process_alone
from slabformer.tasks.engine.seeds import reseed
from slabformer.tasks.engine.session import open_folder, recalibrate_after, train_and_finish

logger = logging.getLogger(__name__)


@leaves_the_process_alone
def train(config: TrainConfig, *, observers: Sequence[Observer] = ()) -> TrainResult:
    """Train as ``config`` says, or go on with the run in ``config.output``.

    The folder then holds ``config.yaml``, ``metrics.csv``, ``steps.csv`` (with every part of the loss), TensorBoard
    events, the last checkpoints, ``best.safetensors`` (highest box AP among the evaluated epochs with gamma 0) and at
    the end ``model.safetensors`` and ``result.json``.

    Args:
        config: The recipe.
        observers: Told how training goes, on the main process.

    Raises:
        ValueError: If the recipe does not fit the data, the weights or the run in the folder, or would take days on
            this CPU and nobody said that it may.
        NonFiniteError: If the loss, a gradient or a weight is NaN or infinite; the last good checkpoint stays.
        StoppedError: After SIGTERM or SIGINT, once a checkpoint is written.
        OSError: If the disk is full or not writable.
    """
    folder, found = open_folder(config, RunFolder)
    if found == "finished":
        return finished_before(folder)
    check_optimizer(config.optimizer)
    if found == "new":
        check_model(config.model)
    run = _Run(config, folder)
    if found == "new":
        run.refuse_slow_cpu()
    losses = MASK_LOSSES if run.info.detector.masks else BOX_LOSSES
    return train_and_finish(run, CsvObserver(folder.path, COLUMNS, losses), observers)


def detection_losses(detector: nn.Module, batch: DetectionBatch) -> dict[str, Tensor]:
    """Losses of a batch by name."""
    return detector(batch.images, batch.targets)


def _refuse_other_classes(train: DetectionLoader, validation: DetectionLoader) -> None:
    """Labels mean the same in both files only if the same categories are listed.

    Raises:
        ValueError: If they are not; names the first that only one lists.
    """
    listed = [set(zip(loader.category_ids, loader.class_names, strict=True)) for loader in (train, validation)]
    if listed[0] != listed[1]:
        category, name = min(listed[0] ^ listed[1])
        raise ValueError(
            f"training and validation annotations list different categories (first: {category}, {name!r}); "
            "give both files the same list, used or not"
        )


class _Run:
    """One run's parts."""

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.accelerator = create_accelerator(config.precision, config.device)
        if self.accelerator.device.type == "cpu" and config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        self.train_loader, self.val_loader = self._loader("train"), self._loader("validation")
        check_accumulate(config.accumulate, len(self.train_loader))
        _refuse_other_classes(self.train_loader, self.val_loader)
        self.info = DetectorInfo(
            backbone=config.model.backbone,
            backbone_args=backbone_args(config.model),
            detector=replace(
                config.detector, num_classes=len(self.train_loader.class_names), masks=self.train_loader.has_masks
            ),
            class_names=self.train_loader.class_names,
            category_ids=self.train_loader.category_ids,
            size=config.augment.size,
            max_size=config.augment.max_size,
        )
        reseed(config.seed)
        self.detector = build_model(config.model, self.info.detector, self.info.class_names)
        self.detector.to(self.accelerator.device)
        if config.compile:
            self.detector.backbone.compile()  # what follows it hangs on what is found
        if self.accelerator.num_processes > 1:
            sf.sync_norms_(self.detector)

    def _loader(self, split: Split) -> DetectionLoader:
        config = self.config
        return create_loader(
            replace(config.data, masks=config.data.masks and config.detector.masks),
            config.augment,
            split,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=config.num_workers,
        )

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.train_loader) // self.config.accumulate)

    def refuse_slow_cpu(self) -> None:
        """Say what the run would cost where it was meant for an accelerator that is not there."""
        if self.config.device == "auto" and self.accelerator.device.type == "cpu":
            batches = len(self.train_loader) * self.config.epochs
            refuse_slow_cpu(self.detector, self.train_loader, batches, self.accelerator)

    def trainer(self, observers: Sequence[Observer]) -> Trainer:
        """The loop with everything that this recipe gives it."""
        config = self.config
        total_batch = config.batch_size * self.accelerator.num_processes * config.accumulate
        optimizer = build_optimizer(
            config.optimizer, self.detector, total_batch, lambda model: decay_groups(config.optimizer, model)
        )
        steps = self._steps_per_epoch
        return Trainer(
            accelerator=self.accelerator,
            model=self.detector,
            optimizer=optimizer,
            loader=self.train_loader,
            step_fn=detection_losses,
            config=build_loop_config(config, epochs=config.epochs, clip_norm=config.optimizer.clip_norm),
            store=CheckpointStore(self.folder.path, config.keep, self.folder.record),
            lr_schedule=RateSchedule(optimizer, config.lr_schedule, epochs=config.epochs, steps_per_epoch=steps),
            gamma_schedule=build_fading(config.gamma, self.detector, optimizer, config.epochs * steps),
            evaluate=self._evaluate,
            best_metric="box_ap",
            on_best=lambda _: self._save("best"),
            batch_names=self.train_loader.batch_names,
            observers=observers,
            fingerprint={
                **fingerprint(config.to_dict(), config.harmless()),
                "processes": self.accelerator.num_processes,
                "class_names": self.info.class_names,
                "category_ids": self.info.category_ids,
            },
        )

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        metrics = self._metrics(trainer)
        if trainer.gamma > 0:
            with sf.blended(trainer.model):
                metrics |= {f"blend_{name}": value for name, value in self._metrics(trainer, "blend").items()}
        return metrics

    def _metrics(self, trainer: Trainer, form: str = "deployed form") -> dict[str, float]:
        progress = trainer.progress(f"evaluate {form}", len(self.val_loader))
        return flat(evaluate(self.detector, self.val_loader, accelerator=self.accelerator, progress=progress))

    def finish(self, trainer: Trainer) -> TrainResult:
        """Recalibrate what moves, evaluate and save."""
        norms = live_norms(self.detector)
        if self.config.recalibrate.enabled and len(norms):
            self._recalibrate(trainer, norms)
        metrics = self._metrics(trainer)
        if self.accelerator.is_main_process:
            self._save("model")
            self.folder.finish(metrics)
        self.accelerator.wait_for_everyone()
        return TrainResult(
            detector=self.detector.eval(),
            history=read_history(self.folder.path),
            metrics=metrics,
            output=self.folder.path,
        )

    def _recalibrate(self, trainer: Trainer, norms: nn.ModuleList) -> None:
        """Through the backbone alone."""
        detector = self.detector.eval()

        def forward(_: nn.Module, batch: DetectionBatch) -> None:
            images, _ = detector.transform(to_device(batch.images, self.accelerator.device))
            detector.backbone(images.tensors)

        recalibrate_after(trainer, norms, self.config.recalibrate, forward)

    def _save(self, name: str) -> None:
        self.folder.record(f"{name}.safetensors")
        save_detector(self.detector, self.folder.path / f"{name}.safetensors", self.info)
