"""`slab eval`: accuracy of a model on a data set."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table
from torch import nn

import slabformer as sf
from slabformer.cli.common import add_model_options, console, example_images
from slabformer.cli.data import (
    STDOUT,
    ExamplesFormatter,
    add_data_options,
    add_device_option,
    data_of,
    load_trained,
    progress_bar,
    write_json,
)
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.classification.augment import AugmentConfig
from slabformer.tasks.classification.data import Loader, create_loader
from slabformer.tasks.classification.evaluate import ClassResult, EvalResult, evaluate
from slabformer.tasks.engine.files import replaced
from slabformer.tasks.saved_model import ModelInfo

logger = logging.getLogger(__name__)
EXAMPLES = """examples:
  slab eval runs/digits/model.safetensors --data digits
  slab eval runs/digits/model.safetensors --data digits --fused --per-class classes.csv
  slab eval slab_deit_tiny --pretrained --data /data/imagenet --batch-size 256
  slab eval slab_deit_tiny --checkpoint slab_deit_tiny.pth --data wds//data/imagenet-wds --json result.json
"""


def parser() -> ArgumentParser:
    """Options of `slab eval`."""
    made = ArgumentParser(
        prog="slab eval",
        description="Accuracy on validation images, of the deployed form, and of the blend too while gamma is above 0.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    add_model_options(made)
    add_data_options(made)
    add_device_option(made)
    made.add_argument("--fused", action="store_true", help="fold the norms before evaluating")
    made.add_argument("--per-class", type=Path | None, help="also write every class's accuracy to this CSV file")
    made.add_argument("--json", type=Path | None, help="also write the figures as JSON; - for standard output alone")
    return made


def run(config: Namespace) -> None:
    """Evaluate and print a table."""
    model, info = load_trained(config)
    data = data_of(config, info, "validation")
    loader = create_loader(
        data, AugmentConfig(), "validation", batch_size=config.batch_size, seed=0, num_workers=config.num_workers
    )
    _compare_names(info, loader)
    if config.fused and not info.fused:
        images = example_images(info, batch_size=2).to(next(model.parameters()).device)
        model, _ = sf.fuse(model, images)
    results = dict(_evaluate(model, loader, "fused" if config.fused or info.fused else "deployed", config.per_class))
    deployed = next(iter(results.values()))
    if config.json != STDOUT:
        console().print(_table(f"{info.model} on {config.data}", results))
    write_json(config.json, {form: result.to_dict() for form, result in results.items()})
    if config.per_class is not None and deployed.per_class is not None:
        write_classes(config.per_class, deployed.per_class)


def _evaluate(model: nn.Module, loader: Loader, form: str, per_class: Path | None) -> Iterator[tuple[str, EvalResult]]:
    total = loader.order.count
    with progress_bar("evaluate", total) as advance:
        yield form, evaluate(model, loader, per_class=per_class is not None, progress=advance)
    norms = list(prepbn_modules(model).values())
    if any(norm.phase != "done" for norm in norms):
        gamma = max(float(norm.gamma) for norm in norms)
        with sf.blended(model), progress_bar("blend", total) as advance:
            yield f"blend, gamma {gamma:.2f}", evaluate(model, loader, progress=advance)


def _compare_names(info: ModelInfo, loader: Loader) -> None:
    """Say so if classes that are as many as the model's are called otherwise: labels may mean something else."""
    if len(info.class_names) != len(loader.class_names):
        return  # a model given by name has none; a wrong number is refused when the first logits are there
    pairs = zip(info.class_names, loader.class_names, strict=True)
    different = [(label, *names) for label, names in enumerate(pairs) if names[0] != names[1]]
    if different:
        message = "%d classes are named otherwise than in the model (first: label %d is %r here, %r there)"
        label, model_name, data_name = different[0]
        logger.warning(message, len(different), label, data_name, model_name)


def _table(title: str, results: dict[str, EvalResult]) -> Table:
    table = Table(title=title)
    table.add_column("form")
    for heading in ("top-1 %", "top-5 %", "loss", "images", "images/s"):
        table.add_column(heading, justify="right")
    for form, result in results.items():
        top5 = "-" if result.top5 is None else f"{100 * result.top5:.2f}"
        figures = (f"{100 * result.top1:.2f}", top5, f"{result.loss:.4f}", f"{result.images:,}")
        table.add_row(form, *figures, f"{result.images_per_s:,.0f}")
    return table


def write_classes(path: Path, rows: list[ClassResult]) -> None:
    """One line a class: name, images, top-1."""
    with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "images", "top1"])
        writer.writerows([row.name, row.images, "" if row.top1 is None else f"{row.top1:.6f}"] for row in rows)
