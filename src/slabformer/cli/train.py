"""`slab train`: train a classifier while its LayerNorm fades out."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from slabformer.cli.recipe import config_of, ending_well, recipe_parser, write_outcome
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

    with ending_well():
        result = train(to_train_config(config), observers=[ConsoleObserver()])
    write_outcome(result, result.metrics)
