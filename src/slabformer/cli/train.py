"""`slab train`: train a classifier while its LayerNorm fades out."""

from __future__ import annotations

import sys

import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace

from slabformer.cli.recipe import config_of, recipe_parser, write_once
from slabformer.tasks.classification.config import TrainConfig


def parser() -> ArgumentParser:
    """Options of `slab train`: a recipe, and any of its keys."""
    description = "Train a classifier while its LayerNorm fades out."
    return recipe_parser("slab train", description, "recipes/digits.yaml", TrainConfig)


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    return config_of(parser(), config, TrainConfig)


def run(config: Namespace) -> None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.tasks.classification.train import train
    from slabformer.tasks.engine.console import ConsoleObserver
    from slabformer.tasks.engine.signals import StoppedError

    try:
        result = train(to_train_config(config), observers=[ConsoleObserver()])
    except StoppedError as stopped:
        write_once(sys.stderr, f"slab: {stopped}\n")
        raise SystemExit(stopped.exit_code) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    verdict = "already finished" if result.already_finished else "finished"
    write_once(sys.stdout, f"{verdict}: {result.output}  {figures}\n")
