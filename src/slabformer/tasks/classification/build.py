"""From a recipe to the objects that train it."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import slabformer as sf
from slabformer._extras import require
from slabformer.nn.controls import prepbn_modules
from slabformer.progressive import ProgressiveSchedule
from slabformer.tasks.classification.config import ModelConfig, TrainConfig

logger = logging.getLogger(__name__)


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The model of ``config``, with its weights loaded and its norms converted.

    Raises:
        ValueError: If timm does not know it, refuses an argument, or the weights do not fit; says what is near.
    """
    timm = require("timm", extra="vision")
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model {config.name!r}{suggestion}; `slab list` shows ours")
    arguments = model_arguments(config, num_classes, image_size)
    try:
        model = timm.create_model(config.name, pretrained=config.pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"{config.name} refuses its arguments ({error}); check model.args") from error
    if config.weights is not None:
        load_weights(model, Path(config.weights))
    if config.convert_norms:
        names = sf.convert_norms_(model)
        logger.info("converted %d norms of %s", len(names), config.name)
    return model


def model_arguments(config: ModelConfig, num_classes: int, image_size: int) -> dict[str, Any]:
    """What ``timm.create_model`` is given: ``img_size`` only where the model's own is another."""
    default = require("timm.models", extra="vision").get_pretrained_cfg(config.name)
    own = default.input_size[-1] if default is not None else None
    size = {} if image_size == own else {"img_size": image_size}
    return {"num_classes": num_classes, **size, **config.args}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``model``, name for name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file, or names or shapes do not fit; names the first ones.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; model.weights is a safetensors file")
    safetensors = require("safetensors", extra="vision")
    try:
        state = require("safetensors.torch", extra="vision").load_file(str(path))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {len(missing)} tensors missing (first: {_first(missing)}), "
            f"{len(unexpected)} unexpected (first: {_first(unexpected)}), {len(shapes)} of another shape "
            f"(first: {_first(shapes)})"
        )
    model.load_state_dict(state)


def _first(names: list[str]) -> str:
    return names[0] if names else "none"


def build_optimizer(config: TrainConfig, model: nn.Module, total_batch: int) -> Optimizer:
    """timm's optimizer, its rate scaled to ``total_batch``."""
    optimizer = config.optimizer
    try:
        return require("timm.optim", extra="vision").create_optimizer_v2(
            model,
            opt=optimizer.name,
            lr=optimizer.lr * rate_scale(config, total_batch),
            weight_decay=optimizer.weight_decay,
            layer_decay=optimizer.layer_decay,
            **optimizer.args,
        )
    except (AssertionError, TypeError) as error:
        raise ValueError(f"timm refuses optimizer {optimizer.name!r}: {error}; check its name and args") from error


def rate_scale(config: TrainConfig, total_batch: int) -> float:
    """Factor on every learning rate of the recipe."""
    base = config.optimizer.lr_base_batch
    return 1.0 if base is None else total_batch / base


def build_lr_schedule(
    config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int, total_batch: int
) -> tuple[Any, int]:
    """timm's schedule, and the number of epochs with cool-down."""
    schedule, scale = config.lr_schedule, rate_scale(config, total_batch)
    if schedule.warmup_epochs >= config.epochs:
        raise ValueError(
            f"lr_schedule.warmup_epochs ({schedule.warmup_epochs:g}) must be below epochs ({config.epochs})"
        )
    return require("timm.scheduler", extra="vision").create_scheduler_v2(
        optimizer,
        sched=schedule.name,
        num_epochs=config.epochs,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=schedule.warmup_lr * scale,
        min_lr=schedule.min_lr * scale,
        cooldown_epochs=schedule.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )


def build_gamma_schedule(
    config: TrainConfig, model: nn.Module, optimizer: Optimizer, total_steps: int
) -> ProgressiveSchedule | None:
    """The fading of the model's norms; None if it has no PRepBN, or all of them have faded before."""
    norms = prepbn_modules(model).values()
    if all(norm.phase == "done" for norm in norms):
        return None
    gamma = config.gamma
    return ProgressiveSchedule(
        model,
        total_steps=total_steps,
        warmup=gamma.warmup,
        fade=gamma.fade,
        shape=gamma.shape,
        warm_statistics=gamma.warm_statistics,
        optimizer=optimizer,
    )
