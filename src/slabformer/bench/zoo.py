"""Benchmarks of many models in one table that grows model by model, whatever interrupts it and whichever breaks."""

from __future__ import annotations

import csv
import gc
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from slabformer._files import write_csv, write_text
from slabformer._listing import check_regular
from slabformer._moved import RENAMED, current_rows
from slabformer.bench.report import BenchReport, columns
from slabformer.measure.timing import Machine

logger = logging.getLogger(__name__)
Row = dict[str, str]
#: what must agree for a row to stand for what would be measured now
SAME = ("settings", "device", "threads", "versions")
#: columns of the Markdown table: heading, and the speeds behind it
VARIANTS = {"LayerNorm baseline": "baseline ms", "as given": "given ms", "fused": "fused ms", "ceiling": "ceiling ms"}


class ZooTable:
    """``bench.csv`` of many models, and the same in Markdown beside it; each model's newest measurement.

    Args:
        folder: Of both files, created if it is not there.
        machine: Where rows are measured now.
        settings: How, in words; a model whose rows say otherwise is measured again.
    """

    def __init__(self, folder: Path, machine: Machine, settings: str) -> None:
        self.path, self.markdown = folder / "bench.csv", folder / "bench.md"
        self.where = _as_text({**machine.columns(), "settings": settings})
        self.rows = _read(self.path)

    def has(self, model: str) -> bool:
        """Whether ``model`` was measured, without an error, as it would be now."""
        rows = [row for row in self.rows if row["model"] == model]
        return bool(rows) and all(not row["error"] and all(row[key] == self.where[key] for key in SAME) for row in rows)

    def measure(self, models: Iterable[str], measure: Callable[[str], BenchReport]) -> None:
        """Measure the models that are not there yet; one that breaks is a row with its error.

        Args:
            models: Their names.
            measure: Gives the report of one.
        """
        for model in models:
            if self.has(model):
                logger.info("%s is measured already: %s", model, self.path)
                continue
            try:
                found: list[dict[str, object]] = [{**row, "error": ""} for row in measure(model).rows()]
            except Exception as error:  # whatever breaks one model must not end the others
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                logger.warning("%s: %s", model, message)
                found = [{"model": model, "error": message}]
            self._put(model, [_as_text(self.where | row) for row in found])
            torch.compiler.reset()
            gc.collect()

    def _put(self, model: str, rows: list[Row]) -> None:
        self.rows = [row for row in self.rows if row["model"] != model] + rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, self.rows, [*columns(), "settings", "error"])
        write_text(self.markdown, to_markdown(self.rows))


def to_markdown(rows: Sequence[Row]) -> str:
    """A line for each model, batch size and mode, those that broke below, and where it was measured."""
    measured = [row for row in rows if not row["error"]]
    headings = (
        "model",
        "batch",
        "mode",
        *VARIANTS.values(),
        "fused over baseline",
        "fused of ceiling",
        "params",
        "MACs",
    )
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in measured:
        groups.setdefault((row["model"], row["batch_size"], row["mode"]), {})[row["variant"]] = row
    lines = [_line(headings), _line(["---"] * 3 + ["---:"] * (len(headings) - 3))]
    lines += [_line([f"`{key[0]}`", *key[1:], *_cells(variants)]) for key, variants in groups.items()]
    broken = [f"- `{row['model']}` broke: {row['error']}" for row in rows if row["error"]]
    places = dict.fromkeys(
        f"- {row['device']}, {row['threads']} thread(s); {row['versions']}; {row['settings']}; `{row['command']}`"
        for row in measured
    )
    return "\n".join(
        ["# Speed of the zoo", "", *lines, "", *broken, *[""] * bool(broken), "Measured on:", "", *places, ""]
    )


def _cells(variants: dict[str, Row]) -> list[str]:
    """Times of each variant, then what the fused one makes of them."""
    fused = variants.get("fused", variants["as given"])

    def number(row: Row | None, key: str, spelling: str, factor: float = 1.0) -> str:
        return format(float(row[key]) * factor, spelling) if row is not None and row[key] else "-"

    return [
        *(number(variants.get(variant), "p50_ms", ".1f") for variant in VARIANTS),
        number(fused, "over_baseline", ".2f"),
        number(fused, "of_ceiling", ".0%"),
        number(fused, "parameters", ".2f", 1e-6) + " M",
        number(fused, "macs", ".2f", 1e-9) + " G",
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _as_text(row: Mapping[str, object]) -> Row:
    return {key: "" if value is None else str(value) for key, value in row.items()}


def _read(path: Path) -> list[Row]:
    """The rows that are there.

    Raises:
        ValueError: If the file is another benchmark's.
    """
    if not path.exists():
        return []
    check_regular(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = current_rows(csv.DictReader(file))
    if any(row.get("error") is None or row.get("settings") is None for row in rows):
        raise ValueError(f"{path} is no benchmark of several models; choose another folder with --output")
    for row in rows:
        row["settings"] = " ".join(RENAMED.get(setting, setting) for setting in row["settings"].split(" "))
    return [{key: value or "" for key, value in row.items()} for row in rows]
