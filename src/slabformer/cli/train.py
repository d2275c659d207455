"""`slab train`: train a classifier while its LayerNorm fades out."""

from __future__ import annotations

from jsonargparse import Namespace

from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.recipe import config_of, ending_well, outcome_of, recipe_parser
from slabformer.tasks.classification.config import TrainConfig


def parser() -> Parser:
    """Options of `slab train`: a recipe, and any of its keys."""
    return recipe_parser(
        "slab train",
        "Train a classifier while its LayerNorm fades out. A run that was stopped resumes from its output folder.",
        TrainConfig,
        examples=[
            "slab train --config recipes/digits.yaml --output runs/digits",
            "slab train --config recipes/slab_swin_tiny.yaml --data /data/imagenet",
        ],
    )


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    return config_of(parser(), config, TrainConfig)


def run(config: Namespace) -> Outcome | None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.tasks.classification.train import train
    from slabformer.tasks.engine.console import ConsoleObserver

    with ending_well():
        result = train(to_train_config(config), observers=[ConsoleObserver()])
    return outcome_of(result, result.metrics)
