"""Tables that runs and measurements leave."""

from __future__ import annotations

import csv
from pathlib import Path

#: columns that hang on the clock
CLOCK = ("images_per_second",)


def csv_rows(path: Path, *without: str) -> list[dict[str, str]]:
    """The rows of a CSV file as written, but for the columns ``without``."""
    with path.open(newline="") as file:
        return [{name: v for name, v in row.items() if name not in without} for row in csv.DictReader(file)]
