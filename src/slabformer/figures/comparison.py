"""Accuracy against speed of several measured models, from the files that `slab bench` writes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slabformer._listing import check_regular, files_below
from slabformer._moved import HasOldNames, current_rows
from slabformer.measure.rows import Mode
from slabformer.models.registry import baseline_of
from slabformer.models.weights.published import BASELINE_TOP1, BY_MODEL

#: columns of a benchmark that a comparison reads
COLUMNS = (
    "model",
    "variant",
    "mode",
    "batch_size",
    "images_per_second",
    "over_baseline",
    "device",
    "threads",
    "versions",
)
Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model: how fast it ran, how right it is.

    Attributes:
        images_per_second: Measured.
        top1: Accuracy in percent; None where none is known.
        source: Where the accuracy comes from.
    """

    model: str
    images_per_second: float
    top1: float | None
    source: Literal["published", "measured"] | None


@dataclass(frozen=True, kw_only=True)
class Pair(HasOldNames):
    """A fused model, and the LayerNorm baseline that was timed in turns with it.

    Attributes:
        baseline: None where none was timed.
        over_baseline: The fused model's speed over the baseline's, as the benchmark took it in turns.
    """

    fused: Point
    baseline: Point | None
    over_baseline: float | None

    def points(self) -> list[Point]:
        """Both."""
        return [self.fused] if self.baseline is None else [self.baseline, self.fused]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pairs measured alike.

    Attributes:
        mode: Eager or compiled.
        batch_size: Images at once.
        where: Machine, threads and versions.
    """

    pairs: list[Pair]
    mode: Mode
    batch_size: int
    where: str


def compare_files(
    paths: Iterable[Path],
    *,
    mode: Mode | None = None,
    batch_size: int | None = None,
    accuracy: Mapping[str, float] | None = None,
) -> Comparison:
    """Read benchmarks and add what accuracy is known.

    Args:
        paths: CSV files of `slab bench`, or folders with such files anywhere below.
        mode: "compiled" by default where every model has it.
        batch_size: The largest by default that every model has.
        accuracy: Measured top-1 in percent by model name, in place of the published one.

    Raises:
        FileNotFoundError: If a path is missing.
        ValueError: If files hold no benchmark, do not go together, or lack what is asked for.
    """
    models = _by_model(paths)
    chosen, size = _common(models, mode, batch_size)
    alike = {
        name: {row["variant"]: row for row in rows if (row["mode"], int(row["batch_size"])) == (chosen, size)}
        for name, rows in models.items()
    }
    known, asked = dict(accuracy or {}), set(accuracy or {})
    pairs = [_pair(name, rows, known) for name, rows in alike.items()]
    unknown = asked - {point.model for pair in pairs for point in pair.points()}
    if unknown:
        raise ValueError(f"an accuracy was given for {min(unknown)!r}, which is not among {', '.join(models)}")
    return Comparison(pairs=pairs, mode=chosen, batch_size=size, where=_place(alike))


def _by_model(paths: Iterable[Path]) -> dict[str, list[Row]]:
    """Rows of each model, which must come from one file."""
    origin: dict[str, Path] = {}
    models: dict[str, list[Row]] = {}
    for path in _files(paths):
        for row in _read(path):
            name = row["model"]
            if origin.setdefault(name, path) != path:
                raise ValueError(f"{name} was measured in {origin[name]} and in {path}; give one of them")
            models.setdefault(name, []).append(row)
    return models


def _files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = [Path(file) for file in files_below(path, _is_csv)] if path.is_dir() else [path]
        if not found:
            raise ValueError(f"no .csv below {path}; `slab bench --output FOLDER` writes them")
        files += found
    return list(dict.fromkeys(files))


def _is_csv(name: str) -> bool:
    return name.lower().endswith(".csv")


def _read(path: Path) -> list[Row]:
    check_regular(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = current_rows(csv.DictReader(file))
    missing = [name for name in COLUMNS if not rows or rows[0].get(name) is None]
    if missing:
        raise ValueError(f"{path} is no benchmark of `slab bench`: it lacks {', '.join(missing)}")
    measured = [row for row in rows if not row.get("error")]
    if not measured:
        raise ValueError(f"{path} holds no model that could be measured; see its column `error`")
    return measured


def _common(models: Mapping[str, Sequence[Row]], mode: Mode | None, batch_size: int | None) -> tuple[Mode, int]:
    """Mode and batch size that every model was fused and measured in, as asked for or the best there is."""
    measured = {
        name: {(row["mode"], int(row["batch_size"])) for row in rows if row["variant"] == "fused"}
        for name, rows in models.items()
    }
    common = set.intersection(*measured.values())
    modes: tuple[Mode, ...] = ("compiled", "eager") if mode is None else (mode,)
    for chosen in modes:
        sizes = [size for other, size in common if other == chosen and batch_size in (None, size)]
        if sizes:
            return chosen, max(sizes)
    asked = f"{mode or 'eager or compiled'}, batch {batch_size or 'of any size'}"
    told = "; ".join(
        f"{name}: {', '.join(f'{mode} {size}' for mode, size in sorted(have)) or 'none'}"
        for name, have in measured.items()
    )
    raise ValueError(f"not every model was measured fused, {asked}, in common ({told})")


def _pair(model: str, rows: Mapping[str, Row], accuracy: Mapping[str, float]) -> Pair:
    published = BY_MODEL.get(model)
    fused = _point(model, rows["fused"], accuracy, None if published is None else published.top1)
    if "LayerNorm baseline" not in rows:
        return Pair(fused=fused, baseline=None, over_baseline=None)
    name = baseline_of(model) or f"{model} with LayerNorm"
    baseline = _point(name, rows["LayerNorm baseline"], accuracy, BASELINE_TOP1.get(name))
    return Pair(fused=fused, baseline=baseline, over_baseline=float(rows["fused"]["over_baseline"]))


def _point(model: str, row: Row, accuracy: Mapping[str, float], published: float | None) -> Point:
    speed, top1 = float(row["images_per_second"]), accuracy.get(model, published)
    source: Literal["published", "measured"] = "measured" if model in accuracy else "published"
    return Point(model=model, images_per_second=speed, top1=top1, source=None if top1 is None else source)


def _place(models: Mapping[str, Mapping[str, Row]]) -> str:
    rows = [row for variants in models.values() for row in variants.values()]
    places = sorted({f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] != '1')}" for row in rows})
    if len(places) > 1:
        raise ValueError(f"speeds compare on one machine alone, and these are of {len(places)}: {'; '.join(places)}")
    return "; ".join([places[0], *sorted({row["versions"].replace("=", " ") for row in rows})])
