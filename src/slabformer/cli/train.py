"""`slab train`: train a classifier while its LayerNorm fades out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from slabformer.tasks.classification.config import TrainConfig


class _Parser(ArgumentParser):
    """Reads ``--data PATH`` as ``--data.path PATH``: everywhere else the key is a group."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Namespace:
        """See ``ArgumentParser.parse_args``."""
        given = list(sys.argv[1:] if args is None else args)
        short = [f"--data.path{item[6:]}" if item == "--data" or item.startswith("--data=") else item for item in given]
        return super().parse_args(short, *rest, **options)


def parser() -> ArgumentParser:
    """Options of `slab train`: a recipe, and any of its keys."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    options = _Parser(
        prog="slab train",
        allow_abbrev=False,
        description="Train a classifier while its LayerNorm fades out. The output folder goes on where it stopped.",
        epilog="--data PATH is short for --data.path PATH. Keys given after --config override the recipe.",
    )
    options.add_argument("--config", action="config", help="a recipe, e.g. recipes/digits.yaml")
    options.add_class_arguments(TrainConfig)
    return options


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    options = parser()
    # its name before jsonargparse 4.49 was another
    instantiate = options.instantiate if hasattr(options, "instantiate") else options.instantiate_classes
    return TrainConfig(**{key: value for key, value in vars(instantiate(config)).items() if key != "config"})


def run(config: Namespace) -> None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.tasks.classification.train import train
    from slabformer.tasks.engine.console import ConsoleObserver
    from slabformer.tasks.engine.signals import StoppedError

    try:
        result = train(to_train_config(config), observers=[ConsoleObserver()])
    except StoppedError as stopped:
        _write(sys.stderr, f"slab: {stopped}\n")
        raise SystemExit(stopped.exit_code) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    verdict = "already finished" if result.already_finished else "finished"
    _write(sys.stdout, f"{verdict}: {result.output}  {figures}\n")


def _write(stream: TextIO, line: str) -> None:
    """Write ``line`` once, however many processes train."""
    if os.environ.get("RANK", "0") == "0":
        stream.write(line)
