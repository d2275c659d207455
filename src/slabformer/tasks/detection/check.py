"""What is wrong with a detection data set, before hours of training find out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from slabformer._files import write_text
from slabformer._listing import check_regular
from slabformer.tasks.detection.annotations import (
    NOT_EVALUATED,
    SMALLEST_SIDE,
    CocoAnnotations,
    area_of,
    has_mask,
    load_coco,
    mask_extent,
)
from slabformer.tasks.detection.config import DetectionData, Split
from slabformer.tasks.detection.dataset import locate
from slabformer.tasks.detection.digits import make_digits
from slabformer.tasks.detection.schema import (
    PARTS,
    Dataset,
    Mended,
    fits,
    is_id,
    mend,
    nulls,
    problems,
    without_nulls_,
)
from slabformer.tasks.images import UNREADABLE, most_unreadable, read_image
from slabformer.tasks.paths import path_inside

MOST_EXAMPLES = 3
#: EXIF orientations that swap width and height
LYING = (5, 6, 7, 8)
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Finding:
    """One thing that is odd, and whether training or evaluation would refuse it."""

    what: str
    count: int
    examples: list[str]
    stops: bool = False


@dataclass(frozen=True)
class ClassCount:
    """How often a class occurs among the objects that count."""

    name: str
    num_objects: int
    num_images: int


@dataclass
class SplitReport:
    """What one split holds, and what is odd about it."""

    split: Split
    annotations: str
    num_images: int = 0
    num_objects: int = 0
    findings: list[Finding] = field(default_factory=list)
    classes: list[ClassCount] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """Whether training or evaluation would refuse the split."""
        return any(finding.stops for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "stops": self.stops}


def check_data(
    data: DetectionData, *, decode: bool = False, progress: Callable[[], None] | None = None
) -> list[SplitReport]:
    """Look at both splits of ``data``.

    Args:
        data: Which images and annotations.
        decode: Read every image to its end; else only its size, which does not show a truncated one.
        progress: Called after every image.

    Raises:
        ValueError: If a file holds no COCO annotations.
        FileNotFoundError: If it is not there.
    """
    reports = [_check_split(data, split, decode, progress) for split in SPLITS]
    train, validation = reports
    if not train.stops and not validation.stops:
        validation.findings += _class_findings(train, validation)
    return reports


@dataclass(frozen=True)
class MendedFile:
    """An annotation file in which every field is what it must be.

    Attributes:
        changed: How many fields were mended, by what was wrong with them.
        removed: How many records had to go, by why.
    """

    split: Split
    path: Path
    changed: dict[str, int]
    removed: dict[str, int]


def mend_data(data: DetectionData, output: Path) -> list[MendedFile]:
    """Write the annotations of both splits into the folder ``output``, mended; the images stay where they are.

    Raises:
        ValueError: If the data is embedded, ``output`` holds the annotations themselves, or ids are so mixed up that
            nothing can be told; nothing is written then.
    """
    if data.embedded:
        raise ValueError("the embedded digits need no mending; give --data with a folder")
    files = {split: locate(data, split)[1] for split in SPLITS}
    names = {split: file.name for split, file in files.items()}
    if len(set(names.values())) < len(names):
        names = {split: f"{split}_{name}" for split, name in names.items()}
    mended: dict[Split, Mended] = {}
    for split, file in files.items():
        if (output / names[split]).resolve() == file.resolve():
            raise ValueError(f"{output} holds {file.name} itself, which stays as it is; give another folder")
        try:
            mended[split] = mend(load_coco(file))
        except ValueError as error:
            raise ValueError(f"{file} cannot be mended: {error}") from None
    output.mkdir(parents=True, exist_ok=True)
    for split, each in mended.items():
        write_text(output / names[split], json.dumps(each.dataset))
    return [MendedFile(s, output / names[s], dict(each.changed), dict(each.removed)) for s, each in mended.items()]


def _check_split(data: DetectionData, split: Split, decode: bool, progress: Callable[[], None] | None) -> SplitReport:
    folder, file = locate(data, split)
    dataset = make_digits(split)[0] if data.embedded else load_coco(file)
    report = SplitReport(split, f"digits/{split}" if data.embedded else str(file))
    report.num_images, report.num_objects = len(dataset["images"]), len(dataset["annotations"])
    report.findings += [*_field_findings(dataset), *_id_findings(dataset)]
    if report.stops:  # the rest is looked for in what mending would leave
        try:
            dataset = mend(dataset).dataset
        except ValueError as error:
            report.findings.append(Finding("what cannot be mended", 1, [str(error)], stops=True))
            return report
    without_nulls_(dataset)
    annotations = CocoAnnotations(dataset, report.annotations)
    report.classes, report.category_ids = _count_classes(annotations), annotations.category_ids
    report.findings += [*_object_findings(annotations, data, split), *_image_findings(annotations, split)]
    if not data.embedded:
        report.findings += _file_findings(annotations, data, folder, decode, progress)
    return report


def _finding(what: str, found: Iterable[Any], stops: bool = False) -> Iterator[Finding]:
    """A finding if there is anything."""
    examples = [str(item) for item in found]
    if examples:
        yield Finding(what, len(examples), examples[:MOST_EXAMPLES], stops)


def _field_findings(dataset: Dataset) -> Iterator[Finding]:
    """Every field that is not what it must be, those of one kind together."""
    kinds: dict[str, list[str]] = {}
    for problem in problems(dataset):
        example = f"{problem.place}: {problem.given}" if problem.given else problem.place
        kinds.setdefault(f"{problem.part}: {problem.field} {problem.what}", []).append(example)
    for kind, places in kinds.items():
        yield from _finding(kind, places, stops=True)
    for what, count in sorted(nulls(dataset).items()):
        yield Finding(f"{what} is null, as if left out", count, [])


def _id_findings(dataset: Dataset) -> Iterator[Finding]:
    for part in PARTS:
        counts = Counter(row["id"] for row in dataset[part] if is_id(row.get("id")))
        yield from _finding(f"ids used twice among the {part}", [i for i, n in counts.items() if n > 1], stops=True)
    known = {row["id"] for row in dataset["images"] if is_id(row.get("id"))}
    given = ((row.get("id"), row.get("image_id")) for row in dataset["annotations"])
    orphans = [number for number, image in given if is_id(image) and image not in known]
    yield from _finding("annotations of images that are not listed", orphans, stops=True)
    names = Counter(str(row.get("name")) for row in dataset["categories"])
    yield from _finding("categories of one name", [name for name, n in names.items() if n > 1])


def _object_findings(annotations: CocoAnnotations, data: DetectionData, split: Split) -> Iterator[Finding]:
    reasons: dict[str, list[int]] = {}
    beyond, unmasked, misfits, elsewhere, oversized, repeated = [], [], [], [], [], []
    seen: dict[tuple[Any, ...], int] = {}
    counted = {row["id"] for row in annotations.truth()}
    for image in annotations.images:
        for row in annotations.objects.get(image.id, []):
            reason = annotations.why_unusable(row, image)
            if reason is not None:
                reasons.setdefault(reason, []).append(row["id"])
            elif _reaches_beyond(row["bbox"], image.width, image.height):
                beyond.append(row["id"])
            if _is_oversized(row):
                oversized.append(row["id"])
            first = seen.setdefault((image.id, row["category_id"], *row["bbox"]), row["id"])
            if first != row["id"]:
                repeated.append(row["id"])
            matters = reason is None if split == "train" else row["id"] in counted
            if data.masks and matters and not has_mask(row):
                unmasked.append(row["id"])
            if data.masks and not fits(row, image.height, image.width):
                misfits.append(row["id"])
            elif data.masks and reason is None and has_mask(row) and _is_outside_box(row):
                elsewhere.append(row["id"])
    for reason, ids in sorted(reasons.items()):
        counts = "" if reason in NOT_EVALUATED else "; evaluation still counts them"
        yield from _finding(f"annotations {reason}: not trained on{counts}", ids)
    yield from _finding("boxes that reach beyond their image: cut", beyond)
    yield from _finding("annotations without masks; data.masks=false trains on boxes alone", unmasked, stops=True)
    yield from _finding("masks of another size than their image", misfits, stops=True)
    yield from _finding("masks without a pixel in their box: trained on as empty", elsewhere)
    yield from _finding("areas larger than their box; evaluation sorts objects by size with them", oversized)
    yield from _finding("objects listed twice, of one class in one box: trained on and counted twice", repeated)


def _reaches_beyond(bbox: list[float], width: int, height: int) -> bool:
    left, top, box_width, box_height = bbox
    slack = 1  # annotation tools round
    return min(left, top) < -slack or left + box_width > width + slack or top + box_height > height + slack


def _is_oversized(row: dict[str, Any]) -> bool:
    """Whether the area of an object is larger than its box, where it has one."""
    width, height = row["bbox"][2:]
    slack = 1  # of each side, as annotation tools round
    return min(width, height) > 0 and area_of(row) > (width + slack) * (height + slack)


def _is_outside_box(row: dict[str, Any]) -> bool:
    """Whether no pixel of the mask of an object can lie in its box."""
    extent = mask_extent(row)
    if extent is None:
        return True
    left, top, right, bottom = extent
    box_left, box_top, width, height = row["bbox"]
    return min(right, box_left + width) <= max(left, box_left) or min(bottom, box_top + height) <= max(top, box_top)


def _image_findings(annotations: CocoAnnotations, split: Split) -> Iterator[Finding]:
    names = Counter(image.file_name for image in annotations.images)
    small = [image for image in annotations.images if min(image.height, image.width) < SMALLEST_SIDE]
    bare = [image for image in annotations.images if not annotations.usable(image)]
    yield from _finding("files listed twice", [name for name, count in names.items() if count > 1])
    yield from _finding(f"images below {SMALLEST_SIDE} px: not trained on", [image.file_name for image in small])
    yield from _finding("images without a usable object: not trained on", [image.file_name for image in bare])
    if not annotations.images:
        yield Finding("there are no images", 1, [annotations.name], stops=True)
    elif split == "train" and len({*small, *bare}) == len(annotations.images):
        yield Finding("no image is left to train on", 1, [annotations.name], stops=True)


def _file_findings(
    annotations: CocoAnnotations, data: DetectionData, folder: Path, decode: bool, progress: Callable[[], None] | None
) -> Iterator[Finding]:
    missing, damaged, other, outside = [], [], [], []
    for image in annotations.images:
        try:
            path = path_inside(folder, image.file_name)
        except ValueError:
            outside.append(f"{image.file_name!r} of image {image.id}")
            continue
        try:
            size = read_image(path, upright=data.upright).size if decode else size_of(path, upright=data.upright)
            if size != (image.width, image.height):
                other.append(f"{image.file_name} ({size[0]}x{size[1]}, listed as {image.width}x{image.height})")
        except FileNotFoundError:
            missing.append(image.file_name)
        except UNREADABLE:
            damaged.append(image.file_name)
        if progress is not None:
            progress()
    stops = len(missing) + len(damaged) + len(other) > most_unreadable(data.max_unreadable, len(annotations.images))
    yield from _finding(f"images whose file_name leaves {folder}", outside, stops=bool(outside))
    yield from _finding(f"images that are not in {folder}", missing, stops)
    yield from _finding("images that cannot be read", damaged, stops)
    yield from _finding("images of another size than listed", other, stops)


def size_of(path: Path, *, upright: bool = True) -> tuple[int, int]:
    """Width and height of the image at ``path``, without decoding it: turned as its EXIF data says if ``upright``.

    Raises:
        OSError, SyntaxError, ValueError, ...: If it is no image.
    """
    check_regular(path)
    with Image.open(path) as image:
        width, height = image.size
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))  # image.getexif() would decode a PNG
        lies = upright and exif.get(ExifTags.Base.Orientation, 1) in LYING
        return (height, width) if lies else (width, height)


def _count_classes(annotations: CocoAnnotations) -> list[ClassCount]:
    objects, images = Counter[int](), Counter[int]()
    for image in annotations.images:
        labels = annotations.labels(annotations.usable(image)).tolist()
        objects.update(labels)
        images.update(set(labels))
    names = enumerate(annotations.class_names, start=1)
    return [ClassCount(name, objects[label], images[label]) for label, name in names]


def _class_findings(train: SplitReport, validation: SplitReport) -> Iterator[Finding]:
    def classes(report: SplitReport) -> list[tuple[int, str]]:
        return [(i, c.name) for i, c in zip(report.category_ids, report.classes, strict=True)]

    differing = set(classes(train)) ^ set(classes(validation))
    shown = (f"{i}: {name}" for i, name in sorted(differing))
    yield from _finding("categories that are not those of the training annotations", shown, stops=True)
    unseen = [c.name for c, other in zip(validation.classes, train.classes, strict=False) if not other.num_objects]
    yield from _finding("classes without an object to train on", unseen)
