"""`slab detect eval`: box and mask AP of a detector on a data set."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jsonargparse import Namespace
from rich.table import Table

from slabformer.cli.data import add_device_option, device_called, each_form, launched_accelerator
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, FileToWrite, InputPath, NonEmptyStr, PositiveInt, Workers

if TYPE_CHECKING:
    from slabformer.tasks.detection.loader import DetectionLoader
    from slabformer.tasks.detection.metrics import ClassResult, DetectionResult
    from slabformer.tasks.detection.saved import DetectorInfo


def parser() -> Parser:
    """Options of `slab detect eval`."""
    made = Parser(
        "slab detect eval",
        "COCO's twelve numbers for boxes and for masks, of the deployed form, and of the blend too while gamma is "
        "above 0.",
        [
            "slab detect eval runs/detection_digits/model.safetensors --data digits --fused",
            "slab detect eval m.safetensors --data /data/coco --classes classes.csv --json",
            "torchrun --nproc-per-node 8 -m slabformer detect eval m.safetensors --data ...",
        ],
        json_files=True,
    )
    made.add_argument("model", type=ExistingFile, help="a .safetensors file that `slab detect train` or `fuse` wrote")
    made.add_argument(
        "--data",
        type=NonEmptyStr | None,
        help="a folder with val2017 and annotations/instances_val2017.json, or digits",
    )
    made.add_argument(
        "--images", type=Annotated[str, InputPath("folder")] | None, help="folder of the images, if not DATA/val2017"
    )
    made.add_argument(
        "--annotations",
        type=Annotated[str, InputPath("file")] | None,
        help="COCO file, if not the usual one below DATA",
    )
    made.add_argument("--batch-size", type=PositiveInt, default=1, help="images that are read at once")
    made.add_argument("--num-workers", type=Workers, default=0, help="processes that decode images")
    add_device_option(made)
    made.add_argument("--fused", action="store_true", help="fold the norms of the backbone before evaluating")
    made.add_argument("--boxes", action="store_true", help="boxes alone, for annotations without masks")
    made.add_argument(
        "--backend", type=Literal["auto", "faster-coco-eval", "pycocotools"], default="auto", help="what computes AP"
    )
    made.add_argument(
        "--classes", type=FileToWrite | None, help="also show every class's AP, and write it to this CSV file"
    )
    made.add_argument("--results", type=FileToWrite | None, help="also write all detections as COCO's results.json")
    return made


def run(config: Namespace) -> Outcome | None:
    """Evaluate; under torchrun every process takes its share, and the first one tells."""
    with launched_accelerator(config) as accelerator:
        return _run(config, accelerator)


def _run(config: Namespace, accelerator: Any) -> Outcome | None:
    from slabformer._files import write_text
    from slabformer.deployment.detector import fuse_detector
    from slabformer.tasks.detection.evaluate import collect
    from slabformer.tasks.detection.saved import compare_classes, load_detector

    detector, info = load_detector(config.model, device_called(config.device))
    loader = _loader(config, info, accelerator)
    compare_classes(info, loader.class_names)
    if config.fused and not info.fused:
        detector, _ = fuse_detector(detector)
    form = "fused" if config.fused or info.fused else "deployed"
    results: dict[str, DetectionResult] = {}
    detections: list[dict[str, Any]] = []
    measure = partial(collect, detector, loader, backend=config.backend, accelerator=accelerator)
    for name, metrics in each_form(detector, form, loader, measure):
        if not results and config.results is not None:
            detections = metrics.results()  # every rank must ask
        results[name] = metrics.compute()
    if accelerator is not None and not accelerator.is_main_process:
        return None
    if config.results is not None:
        write_text(config.results, json.dumps(detections))
    return _outcome(config, results)


def _loader(config: Namespace, info: DetectorInfo, accelerator: Any) -> DetectionLoader:
    from slabformer.tasks.detection.config import DetectionAugment, DetectionData
    from slabformer.tasks.detection.loader import create_loader

    if config.data is None and (config.images is None or config.annotations is None):
        raise ValueError("which images? give --data FOLDER, or both --images FOLDER and --annotations FILE")
    data = DetectionData(
        path=config.data or ".",
        val_images=config.images,
        val_annotations=config.annotations,
        masks=info.detector.masks and not config.boxes,
    )
    return create_loader(
        data,
        DetectionAugment(policy="none", size=info.size, max_size=info.max_size),
        "validation",
        batch_size=config.batch_size,
        seed=0,
        rank=0 if accelerator is None else accelerator.process_index,
        world_size=1 if accelerator is None else accelerator.num_processes,
        num_workers=config.num_workers,
    )


def _outcome(config: Namespace, results: dict[str, DetectionResult]) -> Outcome:
    """The figures of each form; those of every class where asked for, also in a file."""
    deployed = next(iter(results.values()))
    shown = [_table(f"{config.model.name}, {deployed.num_images:,} images, %", results)]
    if config.classes is not None:
        shown.append(_class_table(deployed.per_class))
        write_classes(config.classes, deployed.per_class)
    return Outcome(data={form: result.to_dict() for form, result in results.items()}, shown=shown)


def _table(title: str, results: dict[str, DetectionResult]) -> Table:
    from slabformer.tasks.detection.metrics import NAMES, shown

    table = Table(title=title)
    table.add_column("")
    for name in NAMES:
        table.add_column(name, justify="right")
    for form, result in results.items():
        for kind, figures in (("boxes", result.box), ("masks", result.mask)):
            if figures is not None:
                table.add_row(f"{form}, {kind}", *(shown(figures[name]) for name in NAMES))
    return table


def _class_table(rows: list[ClassResult]) -> Table:
    from slabformer.tasks.detection.metrics import shown

    table = Table(title="by class, %")
    table.add_column("class")
    for heading in ("objects", "box AP", "box AP50", "mask AP", "mask AP50"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (row.box_ap, row.box_ap50, row.mask_ap, row.mask_ap50)
        table.add_row(row.name, f"{row.num_objects:,}", *map(shown, figures))
    return table


def write_classes(path: Path, rows: list[ClassResult]) -> None:
    """One line a class: name, objects, AP and AP50 of boxes and of masks, empty where there is none."""
    from slabformer._files import write_csv

    columns = ("name", "num_objects", "box_ap", "box_ap50", "mask_ap", "mask_ap50")
    values = ({column: getattr(row, column) for column in columns} for row in rows)
    write_csv(path, ({column: _figure(value) for column, value in row.items()} for row in values), columns)


def _figure(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value
