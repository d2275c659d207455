"""Recipes as `slab train` reads them."""

from __future__ import annotations

from pathlib import Path

from slabformer.cli.train import parser, to_train_config
from slabformer.tasks.classification.config import TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
#: those that `slab lm train` reads are held in tests/tasks/test_lm_train.py
NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.startswith("llama_")]


def load(name: str) -> TrainConfig:
    """The recipe called ``name``."""
    return to_train_config(parser().parse_args(["--config", str(RECIPES / f"{name}.yaml")]))


def header(name: str) -> str:
    """What stands above its keys."""
    return (RECIPES / f"{name}.yaml").read_text().split("model:")[0]
