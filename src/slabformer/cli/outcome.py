"""What a verb hands back: its result for people and as JSON, and what was found wrong."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from slabformer._files import as_json, write_text

logger = logging.getLogger(__name__)
#: widths of tables go by the terminal; files and pipes get room for all columns
PIPE_WIDTH = 160


def console() -> Console:
    """For tables and results, on standard output."""
    made = Console()
    return made if made.is_terminal else Console(width=PIPE_WIDTH)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a verb."""

    data: Any
    """For ``--json``: plain values, dataclasses and paths."""
    shown: Sequence[RenderableType] = ()
    """For people: tables, and lines of text."""
    files: Sequence[Path] = ()
    """What was written: a last line, and ``files`` of the JSON document, which is a mapping then."""
    fault: str = ""
    """What was found wrong, in one line: exit code 1."""


@contextlib.contextmanager
def nothing_else_on_stdout(is_json: bool) -> Iterator[None]:
    """Where one JSON document is to be all of standard output: everything that is written meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if is_json else contextlib.nullcontext():
        yield


def present(outcome: Outcome, is_json: bool, file: Path | None = None) -> None:
    """Write a result to standard output; for people, also as JSON to the ``file`` of ``--json FILE``, as before 0.2."""
    if is_json:
        sys.stdout.write(to_json(_document(outcome)))
        return
    if file is not None:
        logger.warning("--json FILE is deprecated and goes with 0.3; use --json > FILE")
        write_text(file, to_json(_document(outcome)))
    output = console()
    written = [f"wrote {' '.join(map(str, outcome.files))}"] if outcome.files else []
    for part in [*outcome.shown, *written]:
        if isinstance(part, str):  # lines that are copied, paths among them, are not broken
            output.print(part, soft_wrap=True, markup=False)
        else:
            output.print(part)


def _document(outcome: Outcome) -> Any:
    return {**outcome.data, "files": list(outcome.files)} if outcome.files else outcome.data


def to_json(data: Any) -> str:
    """A JSON document, with null for what JSON has no number for."""
    return as_json(_plain(data))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
