"""`slab lm train`: train a LLaMA while its RMSNorms fade out."""

from __future__ import annotations

import sys

import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace

from slabformer.cli.lm.common import quiet_transformers
from slabformer.cli.recipe import config_of, recipe_parser, write_once
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
    from slabformer.tasks.engine.signals import StoppedError
    from slabformer.tasks.language.train import train

    quiet_transformers()
    try:
        result = train(to_train_config(config))
    except StoppedError as stopped:
        write_once(sys.stderr, f"slab: {stopped}\n")
        raise SystemExit(stopped.exit_code) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    shown = ("perplexity", "perplexity_before_recalibration", "bigram_perplexity", "gamma", "seconds")
    figures = "  ".join(f"{name} {result.summary[name]:.4g}" for name in shown if name in result.summary)
    verdict = "already finished" if result.already_finished else "finished"
    write_once(sys.stdout, f"{verdict}: {result.output}  {figures}\n")
