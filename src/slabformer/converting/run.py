"""From a trained model to the same without norms, in one call that goes on where it was interrupted."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer._files import write_json
from slabformer.converting.attention import ATTENTION, LinearAttentions, linear_again_, make_linear_
from slabformer.converting.config import ConvertConfig
from slabformer.converting.norms import NORMS, plan_again, plan_norms
from slabformer.converting.report import write_report
from slabformer.converting.result import COLUMNS, PARTS, ConvertResult, similarity
from slabformer.converting.subjects import num_parts, open_subject
from slabformer.distillation import Distiller, Teacher
from slabformer.nn.attention_masks import keep_padding_out_everywhere_
from slabformer.surgery.batches import call_model, eval_mode, to_device
from slabformer.surgery.conversion_plan import ConversionPlan
from slabformer.tasks.engine.build import (
    build_gamma_schedule,
    build_loop_config,
    build_lr_schedule,
    build_optimizer,
)
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.config import LrConfig, OptimizerConfig, RecalibrateConfig
from slabformer.tasks.engine.devices import create_accelerator
from slabformer.tasks.engine.folder import RunFolder, fingerprint
from slabformer.tasks.engine.loop import Trainer
from slabformer.tasks.engine.observers import STEP_COLUMNS, CsvFile, CsvObserver, Observer, RunStart
from slabformer.tasks.engine.order import OrderedLoader
from slabformer.tasks.engine.process import leaves_the_process_alone
from slabformer.tasks.engine.seeds import reseed
from slabformer.tasks.engine.session import open_folder, recalibrate_after, train_and_finish

logger = logging.getLogger(__name__)

#: learning rate up to so many parameters; above, it falls with the square root of the size
RATE, SIZE = 3e-4, 100e6
#: share of training over which the rate rises, and of the rate where it starts and ends
WARMUP, LOWEST = 0.1, 0.01
REPORT, METRICS, STEPS = "report.html", "metrics.csv", "steps.csv"
CONVERTED, FUSED = "model", "fused"


class ConvertFolder(RunFolder):
    """The output folder of a conversion."""

    OUTPUTS: ClassVar[tuple[str, ...]] = (
        *(METRICS, STEPS, REPORT, ATTENTION, NORMS),
        *(CONVERTED, FUSED, f"{CONVERTED}.safetensors", f"{FUSED}.safetensors"),
    )


def lose_norms(model: str | Path, data: str | Path, output: str | Path, **settings: Any) -> ConvertResult:
    """Convert a trained model: :func:`convert` with the fields of :class:`ConvertConfig` as keywords.

    result = lose_norms("vit_small_patch14_dinov2.lvd142m", "photos/", "runs/vit", steps=1000)
    result.model  # without a norm, and verified
    """
    return convert(ConvertConfig(model=str(model), data=str(data), output=str(output), **settings))


@leaves_the_process_alone
def convert(config: ConvertConfig, *, observers: Sequence[Observer] = ()) -> ConvertResult:
    """Fit, fade, distil, recalibrate, fuse and verify as ``config`` says, or go on with what is in ``config.output``.

    The folder then holds ``config.yaml``, ``metrics.csv``, ``steps.csv``, the last checkpoints, and at the end the
    converted ``model`` and the ``fused`` one (files, or folders for transformers), ``result.json`` and ``report.html``;
    where attention was made linear, ``attention.json``; where norms stay, ``norms.json`` with the plan.

    Args:
        config: The recipe.
        observers: Told how it goes, on the main process.

    Raises:
        FileNotFoundError: If there is no such model or no data.
        ValueError: If the model has no norm, or no attention, to convert, or data and model do not fit together.
        NonFiniteError: If the loss, a gradient or a weight is NaN or infinite; the last good checkpoint stays.
        VerificationError: If the fused model computes something else.
        StoppedError: After SIGTERM or SIGINT, once a checkpoint is written.
        OSError: If the disk is full or not writable.
    """
    folder, found = open_folder(config, ConvertFolder)
    if found == "finished":
        logger.info("%s is finished already; --overwrite true starts again", folder.path)
        return ConvertResult(folder.path, folder.result(), None, already_finished=True)
    run = _Run(config, folder, fresh=found == "new")
    return train_and_finish(run, CsvObserver(folder.path, COLUMNS, PARTS), observers)


class _Run:
    """One conversion's parts."""

    def __init__(self, config: ConvertConfig, folder: ConvertFolder, *, fresh: bool) -> None:
        self.config, self.folder = config, folder
        self.accelerator = create_accelerator(config.precision, config.device)
        self.subject = open_subject(config, self.accelerator.process_index, self.accelerator.num_processes)
        reseed(config.seed)
        self.model = self.subject.model.to(self.accelerator.device)
        teacher = Teacher(self.model)
        self.attentions = self._make_linear(teacher, fresh=fresh)
        self.plan = self._plan(fresh=fresh)
        sf.convert_norms_(self.model, plan=self.plan, eta=0.0)
        keep_padding_out_everywhere_(self.model)
        if self.accelerator.num_processes > 1:
            sf.sync_norms_(self.model)
        self.distiller = Distiller(self.model, teacher, weights=vars(config.weights))
        self._frozen = freeze_unused_(self.distiller, self.subject.held_out[0])
        if fresh:
            self._fit()

    def _make_linear(self, teacher: Teacher, *, fresh: bool) -> LinearAttentions | None:
        """Before norms are replaced: attention is aligned to the teacher's with the norms that it was trained with."""
        if self.config.attention == "none":
            return None
        if fresh:
            return make_linear_(self.model, teacher, self._from_the_start(), self.subject.held_out, self.config)
        return linear_again_(self.model, self.folder.path)

    def _plan(self, *, fresh: bool) -> ConversionPlan | None:
        """Which norms go; None for all."""
        if fresh:
            return plan_norms(self.model, self.subject.held_out, self.config)
        return plan_again(self.folder.path, self.config)

    def _fit(self) -> None:
        """Start near the teacher."""
        sf.fit_norms_(self.model, self._from_the_start(), self.config.fit_batches)

    def _from_the_start(self) -> OrderedLoader:
        loader = self.subject.loader
        loader.set_epoch(0)
        loader.set_start(0)
        return loader

    def trainer(self, observers: Sequence[Observer]) -> Trainer:
        """The loop with everything that this recipe gives it."""
        config = self.config
        rate = config.lr or rate_for(self.model)
        optimizer_config = OptimizerConfig(lr=rate, lr_base_batch=None, weight_decay=config.weight_decay)
        optimizer = build_optimizer(optimizer_config, self.model, total_batch=1)
        parts = num_parts(config)
        lr_schedule, _ = build_lr_schedule(
            LrConfig(warmup_epochs=WARMUP * parts, warmup_lr=LOWEST * rate, min_lr=LOWEST * rate),
            optimizer,
            epochs=parts,
            steps_per_epoch=config.steps // parts,
            scale=1.0,
        )
        return Trainer(
            accelerator=self.accelerator,
            model=self.model,
            optimizer=optimizer,
            loader=self.subject.loader,
            step_fn=lambda model, batch: self.distiller.compare(batch, model).parts,
            config=build_loop_config(config, epochs=parts, clip_norm=config.clip_norm, compile=config.compile),
            store=CheckpointStore(self.folder.path, config.keep, self.folder.record),
            lr_schedule=lr_schedule,
            gamma_schedule=build_gamma_schedule(config.gamma, self.model, optimizer, config.steps),
            evaluate=self._evaluate,
            observers=[*observers, _Start(self, observers)],
            fingerprint={
                **fingerprint(config.to_dict(), config.harmless()),
                "processes": self.accelerator.num_processes,
                "teacher weights": self.distiller.teacher.digest(),
            },
        )

    def similarity(self, model: nn.Module) -> dict[str, float]:
        """How near ``model`` in eval mode is to the teacher, on what is held out."""
        return similarity(model, self.distiller.teacher, self.subject.held_out, self.accelerator.device)

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        metrics = self.similarity(trainer.model)
        if trainer.gamma > 0:
            with sf.blended(trainer.model):
                metrics |= {f"blend_{name}": value for name, value in self.similarity(trainer.model).items()}
        return metrics

    def finish(self, trainer: Trainer) -> ConvertResult:
        """Recalibrate, fuse, verify, save and report."""
        model = trainer.model
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        trained = self.similarity(model)
        recalibrate = RecalibrateConfig(batches=self.config.recalibrate_batches)
        recalibrate_after(trainer, model, recalibrate, call_model)
        result: dict[str, Any] = {"trained": trained, "recalibrated": self.similarity(model)}
        deployed: nn.Module | None = None
        if self.accelerator.is_main_process:
            deployed, report = self.subject.fuse(model.eval())
            verified = sf.verify(model, deployed, [self._on_device(batch) for batch in self.subject.held_out[:2]])
            history = CsvFile(self.folder.path / METRICS, COLUMNS).rows()
            result = {
                "start": {name: history[0][name] for name in trained},
                **result,
                "fused": self.similarity(deployed),
                "difference": verified.max_rel,
                "norms_folded": report.num_folded,
                "norms_kept": report.num_kept,
            }
            if self.plan is not None:
                result["norms_left"] = len(self.plan.keep)
            if self.attentions is not None:
                result |= self.attentions.summary()
            self._save(model, deployed)
            steps = CsvFile(self.folder.path / STEPS, [*STEP_COLUMNS, *PARTS]).rows()
            self.folder.record(REPORT)
            write_report(self.folder.path / REPORT, self.config.model, result, history, steps, report)
            self.folder.finish(result)
        self.accelerator.wait_for_everyone()
        return ConvertResult(self.folder.path, result, deployed)

    def _on_device(self, batch: Any) -> Any:
        return to_device(batch, self.accelerator.device)

    def _save(self, model: nn.Module, deployed: nn.Module) -> None:
        for name, kept in ((CONVERTED, model), (FUSED, deployed)):
            self.folder.record(name, f"{name}.safetensors")
            self.subject.save(kept, self.folder.path, name)


class _Start(Observer):
    """Tells the others how near the model is before the first step."""

    def __init__(self, run: _Run, others: Sequence[Observer]) -> None:
        self._run, self._others = run, others

    def on_start(self, start: RunStart) -> None:
        """A row of metrics for step 0, and a file for the run to go on with."""
        if start.step:
            return
        if self._run.plan is not None:
            self._run.folder.record(NORMS)
            write_json(self._run.folder.path / NORMS, self._run.plan.to_dict())
        if self._run.attentions is not None:
            self._run.folder.record(ATTENTION)
            self._run.attentions.write(self._run.folder.path)
        CsvFile(self._run.folder.path / METRICS, COLUMNS).cut("epoch", 0)  # of a run that left no checkpoint
        for observer in self._others:
            observer.on_epoch({"epoch": 0, "step": 0, "gamma": 1.0, **self._run.similarity(self._run.model)})


def freeze_unused_(distiller: Distiller, batch: Any) -> list[Tensor]:
    """Take what does not move the loss, as a pooler beside hidden states, out of training; returns it.

    DistributedDataParallel would wait for its gradients.
    """
    student = distiller.student
    norms = set(sf.norm_parameters(student))  # in eval mode the fading ones have no gradient yet
    rest = {name: p for name, p in student.named_parameters() if p.requires_grad and name not in norms}
    with eval_mode(student):
        gradients = torch.autograd.grad(distiller(batch), [*rest.values()], allow_unused=True)
    unused = {name: p for (name, p), gradient in zip(rest.items(), gradients, strict=True) if gradient is None}
    if unused:
        logger.info("not trained, since it has no part in what is compared: %s", ", ".join(unused))
    return [parameter.requires_grad_(False) for parameter in unused.values()]


def rate_for(model: nn.Module) -> float:
    """The learning rate for a model of this size."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return RATE * min(1.0, math.sqrt(SIZE / size))
