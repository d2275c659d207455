"""`slab mindspore train`: train a classifier in MindSpore by a recipe of `slab train`."""

from __future__ import annotations

from jsonargparse import Namespace

from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.recipe import config_of, ending_well, outcome_of, recipe_parser
from slabformer.tasks.classification.config import TrainConfig


def parser() -> Parser:
    """Options of `slab mindspore train`: a recipe, and any of its keys."""
    return recipe_parser(
        "slab mindspore train",
        "Train a classifier in MindSpore while its LayerNorm fades out, in graph mode, on the images that `slab train` "
        "reads. Settings without counterpart are refused. A run that was stopped resumes from its output folder.",
        TrainConfig,
        examples=[
            "slab mindspore train --config recipes/digits.yaml --output runs/digits_ms",
            "msrun --worker_num 8 slab mindspore train -c recipe.yaml --data PATH",
        ],
    )


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    return config_of(parser(), config, TrainConfig)


def run(config: Namespace) -> Outcome | None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.mindspore.training.train import train
    from slabformer.tasks.engine.console import ConsoleObserver

    with ending_well():
        result = train(to_train_config(config), observers=[ConsoleObserver()])
    return outcome_of(result, result.metrics)
