"""The same detector with LayerNorm, trained the same way, to hold the other one against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slabformer.tasks.detection.config import TrainConfig
from slabformer.tasks.detection.result import TrainResult
from slabformer.tasks.detection.train import train
from slabformer.tasks.engine.observers import Observer


def baseline_config(config: TrainConfig) -> TrainConfig:
    """The recipe of the baseline, in the folder ``baseline`` of the run.

    Raises:
        ValueError: If weights are given, which belong to one of the two.
    """
    if config.model.starts_trained:
        raise ValueError(
            "the baseline of a run that starts from weights needs its own; train it with --model.norm layernorm"
        )
    model = replace(config.model, norm="layernorm", output_norm="layernorm", convert_norms=False)
    return replace(config, model=model, output=str(Path(config.output) / "baseline"), baseline=False)


def train_baseline(config: TrainConfig, *, observers: Sequence[Observer] = ()) -> TrainResult:
    """Train the baseline of ``config``: see :func:`slabformer.tasks.detection.train.train`."""
    return train(baseline_config(config), observers=observers)
