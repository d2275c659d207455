"""`slab lm train`: train a LLaMA while its RMSNorms fade out."""

from __future__ import annotations

from jsonargparse import Namespace

from slabformer.cli.lm.common import quiet_transformers
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.recipe import config_of, ending_well, outcome_of, recipe_parser
from slabformer.tasks.language.config import TrainConfig


def parser() -> Parser:
    """Options of `slab lm train`: a recipe, and any of its keys."""
    return recipe_parser(
        "slab lm train",
        "Train a LLaMA while its RMSNorms fade out. A run that was stopped goes on from its output folder.",
        TrainConfig,
        examples=[
            "slab lm train --config recipes/llama_micro_prepbn.yaml",
            "slab lm train -c recipes/llama_micro_prepbn.yaml --data books/ -o runs/books",
        ],
    )


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    return config_of(parser(), config, TrainConfig)


def run(config: Namespace) -> Outcome | None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.tasks.language.train import train

    quiet_transformers()
    with ending_well():
        result = train(to_train_config(config))
    told = ("perplexity", "perplexity_before_recalibration", "bigram_perplexity", "gamma", "seconds")
    return outcome_of(result, {name: result.summary[name] for name in told if name in result.summary})
