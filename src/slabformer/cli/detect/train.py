"""`slab detect train`: train Mask R-CNN on a backbone whose LayerNorm fades out or is gone."""

from __future__ import annotations

from dataclasses import replace

from jsonargparse import Namespace
from rich.table import Table

from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.recipe import config_of, ending_well, outcome_of, recipe_parser
from slabformer.tasks.detection.config import TrainConfig


def parser() -> Parser:
    """Options of `slab detect train`: a recipe, and any of its keys."""
    return recipe_parser(
        "slab detect train",
        "Train Mask R-CNN on a backbone whose LayerNorm fades out or is gone. Without options it trains on generated "
        "images of digits, in a few minutes on a CPU (recipes/detection_digits.yaml); for your own data, start from a "
        "recipe for COCO. A run that was stopped resumes from its output folder.",
        TrainConfig,
        examples=[
            "slab detect train --output runs/digits",
            "slab detect train -c recipes/detection_slab_swin_tiny_1x.yaml --data photos",
        ],
    )


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    return config_of(parser(), config, TrainConfig)


def run(config: Namespace) -> Outcome | None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.tasks.detection.baseline import train_baseline
    from slabformer.tasks.detection.train import train
    from slabformer.tasks.engine.console import ConsoleObserver

    settings = to_train_config(config)
    with ending_well():
        result = train(settings, observers=[ConsoleObserver()])
        baseline = train_baseline(settings, observers=[ConsoleObserver()]) if settings.baseline else None
    told = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
    outcome = outcome_of(result, {name: result.metrics[name] for name in told if name in result.metrics}, ".1f")
    if outcome is None or baseline is None:
        return outcome
    return replace(
        outcome,
        data={**outcome.data, "baseline": baseline.metrics},
        shown=[*outcome.shown, _beside(settings.model.backbone, result.metrics, baseline.metrics)],
    )


def _beside(name: str, metrics: dict[str, float], baseline: dict[str, float]) -> Table:
    """The figures of both."""
    table = Table(title="beside its LayerNorm baseline")
    for heading in ("", name, "LayerNorm baseline"):
        table.add_column(heading, justify="right" if heading else "left")
    for figure in metrics:
        table.add_row(figure, f"{metrics[figure]:.1f}", f"{baseline[figure]:.1f}" if figure in baseline else "-")
    return table
