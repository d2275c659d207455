"""`slab detect check-data`: what a detection data set holds, and what is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from rich.markup import escape
from rich.table import Table

from slabformer.cli.common import console
from slabformer.cli.data import STDOUT, progress_bar, write_json
from slabformer.cli.recipe import config_of, recipe_parser
from slabformer.settings import FolderToWrite, JsonToWrite
from slabformer.tasks.detection.config import DetectionData, TrainConfig

if TYPE_CHECKING:
    from slabformer.tasks.detection.check import SplitReport


def parser() -> ArgumentParser:
    """Options of `slab detect check-data`: those of training, of which the data counts."""
    made = recipe_parser("slab detect check-data", "", "recipes/detection_slab_swin_tiny_1x.yaml", TrainConfig)
    made.description = (
        "Look at images and annotations as training would: counts per class, what would be left out, what is missing "
        "or damaged. Exit code 2 if the data could not be trained on."
    )
    made.usage = (
        "slab detect check-data [--data PATH] [--decode] [--fix OUTPUT] [--json FILE] [--config RECIPE] "
        "[any key of training]"
    )
    made.add_argument("--decode", action="store_true", help="read every image to its end, to find truncated ones")
    made.add_argument(
        "--fix",
        type=FolderToWrite | None,
        metavar="OUTPUT",
        help="write mended annotations into this folder; what means nothing is left out, and all of it is told",
    )
    made.add_argument(
        "--json", type=JsonToWrite | None, help="also write the report as JSON; - for standard output alone"
    )
    return made


def run(config: Namespace) -> None:
    """Check and print.

    Raises:
        ValueError: If training would refuse the data, after all was told.
    """
    from slabformer.tasks.detection.check import check_data

    data = config_of(parser(), config, dict)["data"]
    with progress_bar("check", None) as advance:
        reports = check_data(data, decode=config.decode, progress=advance)
    if config.json != STDOUT:
        for report in reports:
            _print(report)
        console().print(_class_table(reports))
    write_json(config.json, [report.to_dict() for report in reports])
    if config.fix is not None:
        data, reports = _fixed(data, config.fix, config.decode)
    reasons = [finding.what for report in reports for finding in report.findings if finding.stops]
    if reasons:
        raise ValueError(f"the data cannot be used as it is: {'; '.join(dict.fromkeys(reasons))}")


def _fixed(data: DetectionData, output: Path, decode: bool) -> tuple[DetectionData, list[SplitReport]]:
    """Mend the annotations of ``data``, say what became of them, and look at the result."""
    from slabformer.tasks.detection.check import SPLITS, check_data, mend_data
    from slabformer.tasks.detection.dataset import locate

    images = {split: str(locate(data, split)[0]) for split in SPLITS}
    written = {}
    for file in mend_data(data, output):
        console().print(f"{file.split}: {escape(str(file.path))}", soft_wrap=True)
        for did, counts in (("mended", file.changed), ("left out", file.removed)):
            for what, count in counts.items():
                console().print(f"  {did} {count}: {escape(what)}", soft_wrap=True)
        written[file.split] = str(file.path)
    mended = replace(
        data,
        train_images=images["train"],
        val_images=images["validation"],
        train_annotations=written["train"],
        val_annotations=written["validation"],
    )
    options = f"--data.train_annotations {written['train']} --data.val_annotations {written['validation']}"
    console().print(f"use them with {escape(options)}", soft_wrap=True)
    return mended, check_data(mended, decode=decode)


def _print(report: SplitReport) -> None:
    size = f"{report.num_images} images, {report.num_objects} objects"
    console().print(f"{report.split}: {size} in {escape(report.annotations)}", soft_wrap=True)
    if not report.findings:
        return
    table = Table("found", "how often", "first", "", show_edge=False)
    for finding in report.findings:
        verdict = "[red]stops[/red]" if finding.stops else ""
        table.add_row(finding.what, str(finding.count), escape(", ".join(finding.examples)), verdict)
    console().print(table)


def _class_table(reports: list[SplitReport]) -> Table:
    table = Table("class", title="objects to train on and to find")
    for report in reports:
        table.add_column(report.split, justify="right")
    names = dict.fromkeys(count.name for report in reports for count in report.classes)
    counts = [{count.name: count.num_objects for count in report.classes} for report in reports]
    for name in names:
        table.add_row(escape(name), *(str(count.get(name, "-")) for count in counts))
    return table
