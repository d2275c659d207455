"""Train a language model while its RMSNorms fade out."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

import slabformer as sf
from slabformer.models.llama import SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.engine.build import check_accumulate
from slabformer.tasks.engine.checkpoint import CheckpointFolders
from slabformer.tasks.engine.devices import told_to_all
from slabformer.tasks.engine.observers import event_writer
from slabformer.tasks.engine.process import leaves_the_process_alone
from slabformer.tasks.engine.seeds import reseed
from slabformer.tasks.engine.session import open_folder
from slabformer.tasks.engine.signals import StopSignals
from slabformer.tasks.language.bigram import bigram_perplexity
from slabformer.tasks.language.build import config_of_model
from slabformer.tasks.language.callback import ProgressiveCallback
from slabformer.tasks.language.config import TrainConfig
from slabformer.tasks.language.folders import LanguageRunFolder, save_model_folder
from slabformer.tasks.language.packing import PackedBlocks, collate
from slabformer.tasks.language.text import TrainingText, read_text
from slabformer.tasks.language.trainer import LanguageTrainer
from slabformer.tasks.language.watch import RecordCallback, SignalCallback, stopped

logger = logging.getLogger(__name__)
#: stands for the tokenizer's size
ANY_VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What :func:`train` leaves, beside the files."""

    output: Path
    """Folder of the run, which ``from_pretrained`` reads."""
    summary: dict[str, Any]
    """``summary.json``: perplexity of the recalibrated, deployed form and of the bigram reference, the text's digest,
    sizes and times."""
    already_finished: bool = False
    """Nothing was trained: the run in ``output`` was complete."""


@leaves_the_process_alone
def train(config: TrainConfig) -> TrainResult:
    """Train as ``config`` says, or go on with the run in ``config.output``.

    The folder then holds ``model.safetensors`` with configuration and tokenizer, ``config.yaml``, ``metrics.csv``,
    ``steps.csv``, ``summary.json`` and the last checkpoints.

    Raises:
        ValueError: If the recipe does not fit the text, the tokenizer or the run in the folder.
        NonFiniteError: If the loss is NaN or infinite; the last good checkpoint stays.
        StoppedError: After SIGTERM or SIGINT, once a checkpoint is written.
        DamagedCheckpointError: If every checkpoint is damaged; a damaged one is told, and the one before it used.
        FolderInUseError: If another process writes to the folder.
        OSError: If the disk is full or not writable; the last checkpoint stays.
    """
    folder, found = open_folder(config, LanguageRunFolder)
    if found == "finished":
        return TrainResult(output=folder.path, summary=folder.result(), already_finished=True)
    config_of_model(config.model, ANY_VOCABULARY)  # what does not go together is told before the text is read
    checkpoint = CheckpointFolders(folder.path).latest() if found == "unfinished" else None
    text = read_text(config, checkpoint)
    reseed(config.seed)
    model = build_model(config, text)
    arguments = training_arguments(config)
    if isinstance(text.train, PackedBlocks):
        samples = config.batch_size * arguments.world_size
        check_accumulate(config.accumulate, -(-len(text.train) // samples))
    with ExitStack() as stack:
        with told_to_all():
            if arguments.process_index == 0:
                stack.enter_context(folder.claimed(config.overwrite))
        if arguments.world_size > 1:
            sf.sync_norms_(model)
        return _run(config, folder, text, model, arguments, checkpoint)


def build_model(config: TrainConfig, text: TrainingText) -> SlabLlamaForCausalLM:
    """A LLaMA with random weights, as large as the recipe says.

    Raises:
        ValueError: If its sizes do not go together.
    """
    tokenizer = text.tokenizer
    settings = {
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        # with a cache transformers does not see where documents end
        "use_cache": False,
    }
    model = SlabLlamaForCausalLM(config_of_model(config.model, len(tokenizer), **settings))
    logger.info("norms: %s", config.model.norm)
    if config.checkpoint_activations:
        model.gradient_checkpointing_enable()
    return model


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The recipe in transformers' words."""
    optimizer = config.optimizer
    return TrainingArguments(
        output_dir=config.output,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        seed=config.seed,
        bf16=config.precision == "bf16",
        use_cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        torch_compile=config.compile,
        learning_rate=optimizer.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": optimizer.min_lr},
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.clip_norm or 0.0,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_steps=config.save_every,
        save_total_limit=config.keep,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
    )


def _run(
    config: TrainConfig,
    folder: LanguageRunFolder,
    text: TrainingText,
    model: SlabLlamaForCausalLM,
    arguments: TrainingArguments,
    checkpoint: Path | None,
) -> TrainResult:
    tokens_per_step = config.batch_size * config.accumulate * arguments.world_size * config.model.context
    record = RecordCallback(folder.path, tokens_per_step)
    with ExitStack() as stack:
        stack.callback(record.close)
        # the first one: a run that was stopped has not ended with gamma above 0
        signals = stack.enter_context(StopSignals())
        callbacks: list[TrainerCallback] = [SignalCallback(signals), record]
        if config.tensorboard and arguments.process_index == 0:
            step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
            events = event_writer(folder.path, folder.record, step)
            stack.callback(events.close)
            callbacks.append(TensorBoardCallback(events))
        if prepbn_modules(model):
            callbacks.append(ProgressiveCallback(**vars(config.gamma)))
        trainer = LanguageTrainer(
            model,
            arguments,
            data_collator=collate,
            train_dataset=text.train,
            eval_dataset=text.held_out,
            processing_class=text.tokenizer,
            callbacks=callbacks,
            record=folder.record,
        )
        trainer.remove_callback(PrinterCallback)
        with told_to_all():
            if trainer.is_world_process_zero():
                folder.record(record.steps.path.name, record.metrics.path.name)
        began = time.perf_counter()
        trainer.train_to_end(checkpoint)
        seconds = time.perf_counter() - began
        summary = _finish(config, text, trainer, signals) | {
            "seconds": round(seconds, 1),
            "resumed": checkpoint is not None,
        }
    with told_to_all():
        if trainer.is_world_process_zero():
            model.config.use_cache = True
            save_model_folder(model, text.tokenizer, folder.path, folder.record)
            folder.finish(summary)
    return TrainResult(output=folder.path, summary=summary)


def _finish(config: TrainConfig, text: TrainingText, trainer: LanguageTrainer, signals: StopSignals) -> dict[str, Any]:
    """Recalibrate and evaluate, from the checkpoint of the last step on.

    Raises:
        StoppedError: Between the two, after a signal.
    """

    def stop_if_asked() -> None:
        signum = signals.agreed()
        if signum:
            raise stopped(signum, trainer.state.global_step)

    summary: dict[str, Any] = {"data": text.record, "steps": trainer.state.global_step}
    summary["parameters"] = trainer.net.num_parameters()
    summary["vocab_size"] = trainer.net.config.vocab_size
    if config.recalibrate.enabled and repbn_modules(trainer.net):
        summary["perplexity_before_recalibration"] = trainer.held_out_perplexity().perplexity
        stop_if_asked()
        trainer.recalibrate(config.recalibrate.batches)
    stop_if_asked()
    summary["perplexity"] = trainer.held_out_perplexity().perplexity
    norms = list(prepbn_modules(trainer.net).values())
    if norms:
        summary["gamma"] = float(norms[0].gamma)
    if isinstance(text.train, PackedBlocks):
        reference = bigram_perplexity(text.train, text.held_out, summary["vocab_size"])
        summary["bigram_perplexity"] = reference.perplexity
    return summary
