"""What every field of a COCO annotation file must hold, and how what does not can be mended.

:data:`FIELDS` is the one table that reading, `slab detect check-data` and its `--fix` follow: a field that is used
anywhere has a row in it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

Row = dict[str, Any]
Dataset = dict[str, list[Row]]

PARTS = ("images", "annotations", "categories")
#: corners of an outline that encloses something
FEWEST_CORNERS = 3
#: no camera and no scanner goes beyond; masks of such an image still fit into memory
LONGEST_SIDE = 2**16
MOST_PIXELS = 2**31 - 1
#: as far as a coordinate may lie from an image's corner; COCO's tools crash on outlines that reach much further
FARTHEST = 2 * LONGEST_SIDE
#: ids become integers of 64 bits
ID_LIMIT = 2**63
#: characters of a value that a message shows
MOST_SHOWN = 60


class NotMendableError(ValueError):
    """A value that means nothing."""


@dataclass(frozen=True)
class Rule:
    """What a field holds.

    Attributes:
        expected: In words, after "must be".
        holds: Whether a value is that.
        mend: What a value must have meant; raises :class:`NotMendableError`.
        required: Whether the field may be left out; an optional one may be null too, which counts as left out.
    """

    expected: str
    holds: Callable[[Any], bool]
    mend: Callable[[Any], Any]
    required: bool = True


@dataclass(frozen=True)
class Problem:
    """A field of a record that is not what it must be.

    Attributes:
        part: "images", "annotations" or "categories".
        index: Of the record in its part.
        id: The record's, None where it has none.
        field: Its name.
        what: What is wrong, the same words for every record: "must be ...".
        given: The value, shortened; empty where there is none.
    """

    part: str
    index: int
    id: Any
    field: str
    what: str
    given: str

    @property
    def place(self) -> str:
        """The record: its part, index and id."""
        return f"{self.part}[{self.index}]" + ("" if self.id is None else f" (id {_shown(self.id)})")

    def __str__(self) -> str:
        return f"{self.place}: {self.field} {self.what}" + (f", got {self.given}" if self.given else "")


def _is_number(value: Any) -> bool:
    # an integer may be too large for a float, and math.isfinite raises there
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_coordinate(value: Any) -> bool:
    return _is_number(value) and abs(value) <= FARTHEST


def is_id(value: Any) -> bool:
    """Whether ``value`` is a whole number of 64 bits, as ids are."""
    return isinstance(value, int) and not isinstance(value, bool) and -ID_LIMIT <= value < ID_LIMIT


def _is_side(value: Any) -> bool:
    return is_id(value) and 0 < value <= LONGEST_SIDE


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_coordinate, value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, int)) and value in (0, 1)


def _is_outline(value: Any) -> bool:
    return isinstance(value, list) and len(value) % 2 == 0 and all(map(_is_coordinate, value))


def _is_mask(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_outline, value))
    return isinstance(value, dict) and not why_no_rle(value)


def why_no_rle(code: Row) -> str:
    """What is wrong with a run-length encoding; empty if nothing is.

    Counts are runs of 0 and 1 in turn down the columns, as numbers or in COCO's characters, and fill the size exactly:
    COCO's own tools read past their end otherwise.
    """
    size = code.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_side, size)) and math.prod(size) <= MOST_PIXELS):
        return "its size must be [height, width]"
    counts = code.get("counts")
    try:
        runs = np.array(counts if isinstance(counts, list) else runs_of(counts))
    except (ValueError, TypeError, OverflowError):
        return "its counts cannot be read"
    if isinstance(counts, list) and not all(map(is_id, counts)):
        return "its counts must be whole numbers"
    if runs.size and (runs.min() < 0 or runs.max() > MOST_PIXELS):
        return "its counts must be whole numbers from 0 on"
    if int(runs.sum()) != math.prod(size):
        return f"its counts add up to {int(runs.sum())} instead of {size[0]} x {size[1]} = {math.prod(size)}"
    return ""


def runs_of(text: Any) -> np.ndarray:
    """Lengths of the runs that COCO's compressed counts spell.

    A number is written in groups of 5 bits from the lowest on, one character each from "0" on, whose sixth bit says
    that another one follows; from the fourth number on it is the difference to the number two before.

    Raises:
        ValueError: If ``text`` is not such.
    """
    if not isinstance(text, str) or not text.isascii():
        raise ValueError("compressed counts are ASCII text")
    bits = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - ord("0")
    if not bits.size:
        return bits
    last = (bits & 32) == 0
    if bits.min() < 0 or bits.max() > 63 or not last[-1]:
        raise ValueError("compressed counts hold other characters, or end in the middle")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:
        raise ValueError("compressed counts hold a number beyond 60 bits")
    place = np.arange(bits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((bits & 31) << (5 * place), starts)
    negative = (bits[ends] & 16) != 0
    values = np.where(negative, values - (1 << (5 * lengths)), values)
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def _no_mending(value: Any) -> Any:
    raise NotMendableError


def _to_number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise NotMendableError
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise NotMendableError from None
    if not math.isfinite(number):
        raise NotMendableError
    return int(number) if number.is_integer() else number


def _to_integer(value: Any) -> int:
    number = _to_number(value)
    if not isinstance(number, int):
        raise NotMendableError
    return number


def _to_name(value: Any) -> str:
    if not _is_number(value):
        raise NotMendableError
    return str(value)


def _to_box(value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 4:
        raise NotMendableError
    return [_to_number(each) for each in value]


def _to_area(value: Any) -> float | None:
    """None is the area of the box."""
    try:
        number = _to_number(value)
    except NotMendableError:
        return None
    return number if number >= 0 else None


def _to_flag(value: Any) -> int:
    words = {"0": 0, "1": 1, "false": 0, "true": 1, "": 0}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    number = _to_number(value)
    if number not in (0, 1):
        raise NotMendableError
    return int(number)


def _to_mask(value: Any) -> Any:
    """Outlines as lists of numbers; those that mean nothing are left out, unless none is left."""
    if isinstance(value, dict):
        mended = {**value, "size": [_to_integer(side) for side in _listed(value.get("size"))]}
        if isinstance(value.get("counts"), list):
            mended["counts"] = [_to_integer(count) for count in value["counts"]]
        if why_no_rle(mended):
            raise NotMendableError
        return mended
    outlines = _listed(value)
    if outlines and not any(isinstance(outline, list) for outline in outlines):
        outlines = [outlines]  # one outline without the list around it
    mended_outlines = []
    for outline in outlines:
        try:
            numbers = [_to_number(each) for each in _listed(outline)]
        except NotMendableError:
            continue
        if _is_outline(numbers):
            mended_outlines.append(numbers)
    if outlines and not mended_outlines:
        raise NotMendableError
    return mended_outlines


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise NotMendableError
    return value


def fits(row: Row, height: int, width: int) -> bool:
    """Whether the mask of an annotation, if it is an RLE, is as large as its image."""
    mask = row.get("segmentation")
    return not isinstance(mask, dict) or list(mask["size"]) == [height, width]


_ID = Rule("a whole number of 64 bits", is_id, _to_integer)
_FLAG = Rule("0 or 1", _is_flag, _to_flag, required=False)
#: part -> field -> what it holds: every field that is read anywhere
FIELDS: dict[str, dict[str, Rule]] = {
    "images": {
        "id": _ID,
        "file_name": Rule("the name of a file", _is_name, _no_mending),
        "height": Rule(f"a whole number from 1 to {LONGEST_SIDE}", _is_side, _to_integer),
        "width": Rule(f"a whole number from 1 to {LONGEST_SIDE}", _is_side, _to_integer),
    },
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": Rule(f"four numbers from {-FARTHEST} to {FARTHEST}", _is_box, _to_box),
        "area": Rule("a number from 0 on", lambda value: _is_number(value) and value >= 0, _to_area, required=False),
        "iscrowd": _FLAG,
        "ignore": _FLAG,
        "segmentation": Rule(
            f"lists of x, y, x, y ... from {-FARTHEST} to {FARTHEST} or an RLE whose counts fill its size",
            _is_mask,
            _to_mask,
            required=False,
        ),
    },
    "categories": {"id": _ID, "name": Rule("a name", _is_name, _to_name)},
}


def check_structure(dataset: Any, name: str) -> Dataset:
    """``dataset`` if it holds the lists of a COCO file, and records in them.

    Raises:
        ValueError: Naming what is missing.
    """
    for part in PARTS:
        rows = dataset.get(part) if isinstance(dataset, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{name} is no COCO annotation file: it has no list of {part}")
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"{name} is no COCO annotation file: {part}[{index}] is no record but {_shown(row)}")
    return cast(Dataset, dataset)


def problems(dataset: Dataset) -> Iterator[Problem]:
    """Every field of every record that is not what :data:`FIELDS` wants."""
    for part, rules in FIELDS.items():
        for index, row in enumerate(dataset[part]):
            for field, rule in rules.items():
                what = _what_is_wrong(row, field, rule)
                if what:
                    given = _shown(row[field]) if field in row else ""
                    yield Problem(part, index, row.get("id"), field, what, given)


def _what_is_wrong(row: Row, field: str, rule: Rule) -> str:
    value = row.get(field)
    if value is None:
        if not rule.required:
            return ""
        return f"must be {rule.expected}" if field in row else "is missing"
    if rule.holds(value):
        return ""
    if field == "segmentation" and isinstance(value, dict):
        return f"is no RLE: {why_no_rle(value)}"
    return f"must be {rule.expected}"


def nulls(dataset: Dataset) -> Counter[str]:
    """How often an optional field is null, by "part: field"; it counts as left out."""
    return Counter(
        f"{part}: {field}"
        for part, rules in FIELDS.items()
        for row in dataset[part]
        for field, rule in rules.items()
        if not rule.required and field in row and row[field] is None
    )


def without_nulls_(dataset: Dataset) -> Dataset:
    """``dataset`` itself, its optional fields left out where they are null."""
    for part, rules in FIELDS.items():
        optional = [field for field, rule in rules.items() if not rule.required]
        for row in dataset[part]:
            for field in optional:
                if field in row and row[field] is None:
                    del row[field]
    return dataset


@dataclass(frozen=True)
class Mended:
    """A data set without problems, and what became of those that it had.

    Attributes:
        dataset: The rest of the file's parts are kept as they are.
        changed: Fields that were mended, by what was wrong with them.
        removed: Records that could not be mended, by why they had to go.
    """

    dataset: Dataset
    changed: Counter[str]
    removed: Counter[str]


def mend(dataset: Dataset) -> Mended:
    """A copy of ``dataset`` in which every record is as :data:`FIELDS` wants it, ids are unique and images known.

    Records that cannot be mended are left out. Ids of annotations that occur twice are numbered anew.

    Raises:
        ValueError: If two different images, or categories, have one id: what belongs to which cannot be told.
    """
    changed, removed = Counter[str](), Counter[str]()
    mended: Dataset = {**dataset}
    named = _numbers_of_names(dataset)
    for part, rules in FIELDS.items():
        rows = []
        for row in _with_numbers(dataset[part], part, named, changed):
            new = _mend_row(row, part, rules, changed, removed)
            if new is not None:
                rows.append(new)
        mended[part] = rows
    for part in ("images", "categories"):
        mended[part] = _without_copies(mended[part], part, removed)
    known = {row["id"] for row in mended["images"]}
    listed = [row for row in mended["annotations"] if row["image_id"] in known]
    removed["annotations of images that are not listed"] += len(mended["annotations"]) - len(listed)
    sizes = {row["id"]: [row["height"], row["width"]] for row in mended["images"]}
    fitting = [row for row in listed if fits(row, *sizes[row["image_id"]])]
    removed["annotations with masks of another size than their image"] += len(listed) - len(fitting)
    mended["annotations"] = _renumbered(fitting, changed)
    return Mended(mended, +changed, +removed)


#: field -> part whose ids it holds
_REFERENCES = {
    "images": {"id": "images"},
    "categories": {"id": "categories"},
    "annotations": {"image_id": "images", "category_id": "categories"},
}


def _numbers_of_names(dataset: Dataset) -> dict[str, dict[str, int]]:
    """For images and categories a number for each id that is text and none, beyond all numbers there are."""
    numbers: dict[str, dict[str, int]] = {}
    for part in ("images", "categories"):
        ids: list[Any] = [row.get("id") for row in dataset[part]]
        following = max((int(value) for value in ids if is_id(value)), default=0) + 1
        names = dict.fromkeys(value for value in ids if _is_name(value) and not _is_numeral(value))
        numbers[part] = {str(name): following + index for index, name in enumerate(names)}
    return numbers


def _is_numeral(value: Any) -> bool:
    try:
        _to_integer(value)
    except NotMendableError:
        return False
    return True


def _with_numbers(rows: list[Row], part: str, named: dict[str, dict[str, int]], changed: Counter[str]) -> Iterator[Row]:
    for row in rows:
        new = row
        for field, of in _REFERENCES[part].items():
            value = row.get(field)
            if isinstance(value, str) and value in named[of]:
                new = {**new, field: named[of][value]}
                changed[f"{part}: {field} was text"] += 1
        yield new


def _mend_row(row: Row, part: str, rules: dict[str, Rule], changed: Counter[str], removed: Counter[str]) -> Row | None:
    new = dict(row)
    for field, rule in rules.items():
        what = _what_is_wrong(row, field, rule)
        if not what:
            if not rule.required and new.get(field, 0) is None:
                del new[field]
                changed[f"{part}: {field} was null"] += 1
            continue
        kind = f"{part}: {field} {what}"
        try:
            value = _mended_value(row, part, field, rule)
        except NotMendableError:
            removed[kind] += 1
            return None
        new.pop(field, None)
        if value is not None:
            new[field] = value
        changed[kind] += 1
    return new


def _mended_value(row: Row, part: str, field: str, rule: Rule) -> Any:
    if part == "annotations" and field == "id" and row.get("id") is None:
        return -1  # numbered anew with those that occur twice
    value = rule.mend(row.get(field))
    if value is not None and not rule.holds(value):
        raise NotMendableError
    return value


def _without_copies(rows: list[Row], part: str, removed: Counter[str]) -> list[Row]:
    of_id: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row in of_id[row["id"]]:
            removed[f"{part} listed twice"] += 1
        else:
            of_id[row["id"]].append(row)
    for number, same in of_id.items():
        if len(same) > 1:
            raise ValueError(f"id {number} belongs to {len(same)} different {part}; which is meant cannot be told")
    return [row for (row,) in of_id.values()]


def _renumbered(rows: list[Row], changed: Counter[str]) -> list[Row]:
    """``rows``, new ids beyond all others given to those that have none or one that occurred before."""
    taken = {row["id"] for row in rows}
    following = max(taken, default=0) + 1
    seen: set[int] = set()
    for row in rows:
        if row["id"] < 0 or row["id"] in seen:
            row["id"], following = max(following, 1), max(following, 1) + 1
            changed["annotations: id was missing, negative or used before"] += 1
        seen.add(row["id"])
    return rows


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 4]} ..."
