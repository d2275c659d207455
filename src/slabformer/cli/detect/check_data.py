"""`slab detect check-data`: what a detection data set holds, and what is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from slabformer.cli.data import progress_bar
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.recipe import recipe_parser, settings_of
from slabformer.settings import FolderToWrite
from slabformer.tasks.detection.config import TrainConfig

if TYPE_CHECKING:
    from slabformer.tasks.detection.check import SplitReport
    from slabformer.tasks.detection.config import DetectionData


def parser() -> Parser:
    """Options of `slab detect check-data`: those of training that name the data."""
    made = recipe_parser(
        "slab detect check-data",
        "Look at images and annotations as training would: counts per class, what would be left out, what is missing "
        "or damaged. Exit code 1 if the data could not be trained on.",
        TrainConfig,
        examples=["slab detect check-data --data photos --decode", "slab detect check-data --data photos -o mended"],
        sections=("data",),
        json_files=True,
    )
    made.add_argument("--decode", action="store_true", help="read every image to its end, to find truncated ones")
    made.add_argument(
        "--output",
        dest="mended",
        type=FolderToWrite | None,
        aliases=["--fix"],
        help="write mended annotations into this folder; what means nothing is left out, and all of it is told",
    )
    return made


def run(config: Namespace) -> Outcome:
    """Check, mend where asked, and check again; what training would refuse is a fault."""
    from slabformer.tasks.detection.check import check_data

    data = settings_of(parser(), config)["data"]
    with progress_bar("check", None) as advance:
        reports = check_data(data, decode=config.decode, progress=advance)
    shown: list[RenderableType] = [part for report in reports for part in _parts(report)]
    shown.append(_class_table(reports))
    found = [report.to_dict() for report in reports]
    if config.mended is not None:
        data, lines = _mended(data, config.mended)
        shown += lines
        reports = check_data(data, decode=config.decode)
    reasons = dict.fromkeys(finding.what for report in reports for finding in report.findings if finding.stops)
    fault = f"the data cannot be used as it is: {'; '.join(reasons)}" if reasons else ""
    return Outcome(data=found, shown=shown, fault=fault)


def _mended(data: DetectionData, output: Path) -> tuple[DetectionData, list[str]]:
    """``data`` with mended annotations, and what became of them."""
    from slabformer.tasks.detection.check import SPLITS, mend_data
    from slabformer.tasks.detection.dataset import locate

    images = {split: str(locate(data, split)[0]) for split in SPLITS}
    written, lines = {}, []
    for file in mend_data(data, output):
        lines.append(f"{file.split}: {file.path}")
        for did, counts in (("mended", file.changed), ("left out", file.removed)):
            lines += [f"  {did} {count}: {what}" for what, count in counts.items()]
        written[file.split] = str(file.path)
    lines.append(
        f"use them with --data.train-annotations {written['train']} --data.val-annotations {written['validation']}"
    )
    mended = replace(
        data,
        train_images=images["train"],
        val_images=images["validation"],
        train_annotations=written["train"],
        val_annotations=written["validation"],
    )
    return mended, lines


def _parts(report: SplitReport) -> list[RenderableType]:
    size = f"{report.num_images} images, {report.num_objects} objects"
    line = f"{report.split}: {size} in {report.annotations}"
    if not report.findings:
        return [line]
    table = Table("found", "how often", "first", "", show_edge=False)
    for finding in report.findings:
        verdict = "[red]stops[/red]" if finding.stops else ""
        table.add_row(finding.what, str(finding.count), escape(", ".join(finding.examples)), verdict)
    return [line, table]


def _class_table(reports: list[SplitReport]) -> Table:
    table = Table("class", title="objects to train on and to find")
    for report in reports:
        table.add_column(report.split, justify="right")
    names = dict.fromkeys(count.name for report in reports for count in report.classes)
    counts = [{count.name: count.num_objects for count in report.classes} for report in reports]
    for name in names:
        table.add_row(escape(name), *(str(count.get(name, "-")) for count in counts))
    return table
