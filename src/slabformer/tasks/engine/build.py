"""From the recipes that tasks share to the loop's settings, optimizer and schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slabformer._extras import require
from slabformer.nn.controls import prepbn_modules
from slabformer.progressive import Guard, ProgressiveSchedule
from slabformer.tasks.engine.config import FadeConfig, LrConfig, OptimizerConfig, RunConfig
from slabformer.tasks.engine.parts import LoopConfig


def build_loop_config(config: RunConfig, *, epochs: int, clip_norm: float | None, compile: bool = False) -> LoopConfig:
    """The loop's settings in a recipe; ``compile`` lets it compile the training step."""
    return LoopConfig(
        epochs=epochs,
        seed=config.seed,
        accumulate=config.accumulate,
        clip_norm=clip_norm,
        log_every=config.log_every,
        save_every=config.save_every,
        eval_every=config.eval_every,
        compile=compile,
    )


def check_accumulate(accumulate: int, num_batches: int) -> None:
    """Refuse optimizer steps of more batches than one rank has in an epoch: a step never crosses two epochs.

    Raises:
        ValueError: With both numbers.
    """
    if accumulate > num_batches:
        raise ValueError(f"accumulate must be at most {num_batches}, the batches of an epoch, got {accumulate}")


def build_optimizer(
    config: OptimizerConfig,
    model: nn.Module,
    total_batch: int,
    param_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
) -> Optimizer:
    """timm's optimizer, its rate scaled to ``total_batch``; ``param_groups`` says what decays in place of timm."""
    try:
        return require("timm.optim", extra="vision").create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr * rate_scale(config, total_batch),
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            param_group_fn=param_groups,
            **config.args,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"timm refuses optimizer {config.name!r}: {error}; check its name and args") from error


def check_optimizer(config: OptimizerConfig) -> Optimizer:
    """Refuse what timm refuses, before data is read: the optimizer is built for weights that stand for the model's.

    Raises:
        ValueError: See :func:`build_optimizer`.
    """
    return build_optimizer(replace(config, layer_decay=None), nn.Linear(2, 2), total_batch=1)


def rate_scale(config: OptimizerConfig, total_batch: int) -> float:
    """Factor on every learning rate of the recipe."""
    base = config.lr_base_batch
    return 1.0 if base is None else total_batch / base


def build_lr_schedule(
    config: LrConfig, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int, scale: float
) -> tuple[Any, int]:
    """timm's schedule, its rates times ``scale``, and the number of epochs with cool-down."""
    if config.warmup_epochs >= epochs:
        raise ValueError(f"lr_schedule.warmup_epochs ({config.warmup_epochs:g}) must be below epochs ({epochs})")
    schedule, total = require("timm.scheduler", extra="vision").create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr * scale,
        min_lr=config.min_lr * scale,
        cooldown_epochs=config.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    if schedule is None:
        raise ValueError(
            f"lr_schedule.name {config.name!r} is not in this version of timm; update timm, or take another"
        )
    return schedule, total


def build_gamma_schedule(
    config: FadeConfig, model: nn.Module, optimizer: Optimizer, total_steps: int
) -> ProgressiveSchedule | None:
    """The fading of the model's norms; None if it has no PRepBN, or all of them have faded before."""
    norms = prepbn_modules(model).values()
    if all(norm.phase == "done" for norm in norms):
        return None
    return ProgressiveSchedule(
        model,
        total_steps=total_steps,
        warmup=config.warmup,
        fade=config.fade,
        shape=config.shape,
        warm_statistics=config.warm_statistics,
        stagger=config.stagger,
        align=config.align,
        guard=None if config.guard is None else Guard(limit=config.guard),
        optimizer=optimizer,
    )
