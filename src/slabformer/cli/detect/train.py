"""`slab detect train`: train Mask R-CNN on a backbone whose LayerNorm fades out or is gone."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from slabformer.cli.common import console
from slabformer.cli.recipe import config_of, ending_well, recipe_parser, write_outcome
from slabformer.tasks.detection.config import TrainConfig


def parser() -> ArgumentParser:
    """Options of `slab detect train`: a recipe, and any of its keys."""
    description = (
        "Train Mask R-CNN on a backbone whose LayerNorm fades out or is gone. Without options: on digits that are made "
        "on the spot, in some minutes on a CPU (recipes/detection_digits.yaml); "
        "to train on your own data, start from a recipe for COCO."
    )
    return recipe_parser("slab detect train", description, "recipes/detection_slab_swin_tiny_1x.yaml", TrainConfig)


def to_train_config(config: Namespace) -> TrainConfig:
    """The parsed options as a :class:`TrainConfig`."""
    return config_of(parser(), config, TrainConfig)


def run(config: Namespace) -> None:
    """Train as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if training fails."""
    from slabformer.tasks.detection.baseline import train_baseline
    from slabformer.tasks.detection.train import train
    from slabformer.tasks.engine.console import ConsoleObserver

    settings = to_train_config(config)
    with ending_well():
        result = train(settings, observers=[ConsoleObserver()])
        baseline = train_baseline(settings, observers=[ConsoleObserver()]) if settings.baseline else None
    shown = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
    write_outcome(result, {name: result.metrics[name] for name in shown if name in result.metrics}, ".1f")
    if baseline is not None:
        _print_beside(settings.model.backbone, result.metrics, baseline.metrics)


def _print_beside(name: str, metrics: dict[str, float], baseline: dict[str, float]) -> None:
    """The figures of both."""
    table = Table(title="beside its LayerNorm baseline")
    for heading in ("", name, "LayerNorm baseline"):
        table.add_column(heading, justify="right" if heading else "left")
    for figure in metrics:
        table.add_row(figure, f"{metrics[figure]:.1f}", f"{baseline[figure]:.1f}" if figure in baseline else "-")
    console().print(table)
