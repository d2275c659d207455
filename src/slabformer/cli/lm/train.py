"""`slab lm train`: train a LLaMA while its RMSNorms fade out."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from slabformer.cli.lm.common import quiet_transformers
from slabformer.cli.recipe import config_of, ending_well, recipe_parser, write_outcome
from slabformer.tasks.language.config import TrainConfig


def parser() -> ArgumentParser:
    """Options of `slab lm train`: a recipe, and any of its keys."""
    description = "Train a LLaMA while its RMSNorms fade out."
    return recipe_parser("slab lm train", description, "recipes/llama_micro_prepbn.yaml", TrainConfig)


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    return config_of(parser(), config, TrainConfig)


def run(config: Namespace) -> None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.tasks.language.train import train

    quiet_transformers()
    with ending_well():
        result = train(to_train_config(config))
    shown = ("perplexity", "perplexity_before_recalibration", "bigram_perplexity", "gamma", "seconds")
    write_outcome(result, {name: result.summary[name] for name in shown if name in result.summary})
