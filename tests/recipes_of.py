"""Recipes as `slab train` reads them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from slabformer.cli.train import parser, to_train_config
from slabformer.tasks.classification.config import TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
#: what other verbs read: `slab lm train` (tests/tasks/test_lm_train.py), `slab detect train` (tests/tasks/detection)
OTHERS = ("llama_", "detection_")
NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.startswith(OTHERS)]


def load(name: str) -> TrainConfig:
    """The recipe called ``name``, for the caller to change."""
    return copy.deepcopy(_loaded(name))


@functools.cache
def _loaded(name: str) -> TrainConfig:
    return to_train_config(parser().parse_args(["--config", str(RECIPES / f"{name}.yaml")]))


def header(name: str) -> str:
    """What stands above its keys."""
    return (RECIPES / f"{name}.yaml").read_text().split("model:")[0]
