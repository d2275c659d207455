"""`slab eval`: accuracy of a model on a data set."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.table import Table

from slabformer.cli.common import add_model_options, example_images
from slabformer.cli.data import (
    add_data_options,
    add_device_option,
    data_of,
    each_form,
    launched_accelerator,
    load_trained,
)
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, FileToWrite

if TYPE_CHECKING:
    from slabformer.tasks.classification.data import Loader
    from slabformer.tasks.classification.evaluate import ClassResult, EvalResult
    from slabformer.tasks.saved_model import ModelInfo

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Options of `slab eval`."""
    made = Parser(
        "slab eval",
        "Accuracy on validation images, of the deployed form, and of the blend too while gamma is above 0.",
        [
            "slab eval runs/digits/model.safetensors --data digits --fused",
            "slab eval slab_deit_tiny --pretrained --data /data/imagenet --json",
            "torchrun --nproc-per-node 8 -m slabformer eval m.safetensors --data PATH",
        ],
        json_files=True,
    )
    add_model_options(made)
    add_data_options(made)
    add_device_option(made)
    made.add_argument("--fused", action="store_true", help="fold the norms before evaluating")
    made.add_argument("--per-class", type=FileToWrite | None, help="also write every class's accuracy to this CSV file")
    made.add_argument(
        "--real-labels",
        type=ExistingFile | None,
        help="also hold top-1 against several right classes an image: JSON, a list of classes for each image, in the "
        "order of file names (ImageNet-ReaL's real.json)",
    )
    return made


def run(config: Namespace) -> Outcome | None:
    """Evaluate; under torchrun every process takes its share, and the first one tells."""
    with launched_accelerator(config) as accelerator:
        return _run(config, accelerator)


def _run(config: Namespace, accelerator: Any) -> Outcome | None:
    import slabformer as sf
    from slabformer.tasks.classification.config import AugmentConfig
    from slabformer.tasks.classification.data import create_loader
    from slabformer.tasks.classification.evaluate import evaluate
    from slabformer.tasks.classification.real_labels import NumberedSource, RealLabels
    from slabformer.tasks.classification.sources import open_source

    is_main = accelerator is None or accelerator.is_main_process
    model, info = load_trained(config)
    data = data_of(config, info, "validation")
    source = open_source(data, "validation")
    real = None if config.real_labels is None else RealLabels.load(config.real_labels, source)
    loader = create_loader(
        data,
        AugmentConfig(),
        "validation",
        batch_size=config.batch_size,
        seed=0,
        num_workers=config.num_workers,
        rank=0 if accelerator is None else accelerator.process_index,
        world_size=1 if accelerator is None else accelerator.num_processes,
        source=source if real is None else NumberedSource(source),
    )
    if is_main:
        compare_names(info, loader)
    if config.fused and not info.fused:
        images = example_images(info, batch_size=2).to(next(model.parameters()).device)
        model, _ = sf.fuse(model, images)
    form = "fused" if config.fused or info.fused else "deployed"
    options = {"per_class": config.per_class is not None, "real": real, "accelerator": accelerator}
    results = dict(each_form(model, form, loader, partial(evaluate, model, loader, **options)))
    return eval_outcome(config, f"{info.model} on {config.data}", results) if is_main else None


def eval_outcome(config: Namespace, title: str, results: dict[str, EvalResult]) -> Outcome:
    """The figures of each form, and the file of every class's."""
    deployed = next(iter(results.values()))
    if config.per_class is not None and deployed.per_class is not None:
        write_classes(config.per_class, deployed.per_class)
    return Outcome(data={form: result.to_dict() for form, result in results.items()}, shown=[_table(title, results)])


def compare_names(info: ModelInfo, loader: Loader) -> None:
    """Say so if classes that are as many as the model's are called otherwise: labels may mean something else.

    Raises:
        ValueError: If they are the model's in another order.
    """
    if len(info.class_names) != len(loader.class_names):
        return  # a model given by name has none; a wrong number is refused when the first logits are there
    pairs = zip(info.class_names, loader.class_names, strict=True)
    different = [(label, *names) for label, names in enumerate(pairs) if names[0] != names[1]]
    if different:
        message = "%d classes are named otherwise than in the model (first: label %d is %r here, %r there)"
        label, model_name, data_name = different[0]
        if sorted(info.class_names) == sorted(loader.class_names):
            raise ValueError(
                f"the data has the classes of the model in another order (first: label {label} is {data_name!r} here, "
                f"{model_name!r} there); name their folders as in training"
            )
        logger.warning(message, len(different), label, data_name, model_name)


def _table(title: str, results: dict[str, EvalResult]) -> Table:
    table = Table(title=title)
    table.add_column("form")
    real = any(result.real_images is not None for result in results.values())
    for heading in ("top-1 %", *(["real top-1 %"] if real else []), "top-5 %", "loss", "images", "images/s"):
        table.add_column(heading, justify="right")
    for form, result in results.items():
        shares = [result.top1, *([result.real_top1] if real else []), result.top5]
        figures = ("-" if share is None else f"{100 * share:.2f}" for share in shares)
        table.add_row(form, *figures, f"{result.loss:.4f}", f"{result.images:,}", f"{result.images_per_s:,.0f}")
    return table


def write_classes(path: Path, rows: list[ClassResult]) -> None:
    """One line a class: name, images, top-1."""
    from slabformer._files import write_csv

    found = (
        {"class": row.name, "images": row.images, "top1": "" if row.top1 is None else f"{row.top1:.6f}"} for row in rows
    )
    write_csv(path, found, ["class", "images", "top1"])
