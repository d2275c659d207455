"""Rows of text, JSON lines and Parquet files, each with the place that it comes from."""

from __future__ import annotations

import codecs
import importlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from slabformer._listing import check_regular
from slabformer.tasks.engine.documents import parse_json

Unit = Literal["file", "paragraph", "line"]
#: a row, and where it lies, for messages
Row = tuple[Any, str]
#: suffix -> kind of file
KINDS = {".txt": "text", ".md": "text", ".rst": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
#: suffix of what is compressed -> its name in fsspec
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
#: what a file may begin with to say how it is encoded; the longer first
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHUNK = 2**20


def kind_of(file: str | Path) -> str | None:
    """The kind of a file by its suffix, in whatever case, compressed or not; None if there is none such."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    suffixes = [suffix for suffix in suffixes if suffix not in COMPRESSED]
    return KINDS.get(suffixes[-1]) if suffixes else None


def rows_of(files: Iterable[str], unit: Unit) -> Iterator[dict[str, Any]]:
    """Every row of ``files`` as ``row`` and ``where``; ``unit`` says what a row of a text file is.

    Raises:
        ValueError: If a file is damaged or of another kind than its suffix says; names the file and the place.
        ImportError: If what it was compressed by is missing.
    """
    for file in files:
        check_regular(file)
        kind = kind_of(file)
        rows = _text(file, unit) if kind == "text" else _json(file) if kind == "json" else _parquet(file)
        for row, where in rows:
            yield {"row": row, "where": f"{file}, {where}" if where else file}


def _text(file: str, unit: Unit) -> Iterator[Row]:
    with _opened(file) as lines:
        if unit == "file":
            yield {"text": lines.read()}, ""
        elif unit == "line":
            for number, line in enumerate(lines, 1):
                yield {"text": line.rstrip("\n")}, f"line {number}"
        else:
            yield from _paragraphs(lines)


def _paragraphs(lines: Iterable[str]) -> Iterator[Row]:
    parts: list[str] = []
    first = 1
    for number, line in enumerate(lines, 1):
        if line == "\n" and parts and parts[-1].endswith("\n"):
            text = "".join(parts)[:-1]
            if text:
                yield {"text": text}, f"line {first}"
            parts, first = [], number + 1
        else:
            parts.append(line)
    if parts:
        yield {"text": "".join(parts)}, f"line {first}"


def _json(file: str) -> Iterator[Row]:
    """JSON lines, or one list of objects."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):
                rows = _parsed(line + lines.read(), f"{file} cannot be read")
                yield from ((row, f"row {index}") for index, row in enumerate(rows, 1))
                return
            yield _parsed(line, f"{file}, line {number} cannot be read"), f"line {number}"


def _parsed(text: str, title: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{title}: it is not JSON ({error})") from error


def _parquet(file: str) -> Iterator[Row]:
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    number = 0
    with _binary(file) as content:
        try:
            for batch in parquet.ParquetFile(content).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"row {number}"
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file} cannot be read after row {number}: {error}") from error


@contextmanager
def _opened(file: str) -> Iterator[IO[str]]:
    """The text of ``file``, without its byte order mark.

    Raises:
        ValueError: If it is no text; says at which byte.
    """
    with _binary(file) as content:
        start = content.read(4)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    try:
        with _binary(file) as content, io.TextIOWrapper(content, encoding=encoding) as text:
            yield text
    except UnicodeDecodeError as error:
        place, reason = _first_bad_byte(file, encoding) or (error.start, error.reason)
        raise ValueError(f"{file} is no text in {encoding[:6].upper()} ({reason} at byte {place})") from error


@contextmanager
def _binary(file: str) -> Iterator[IO[bytes]]:
    suffix = Path(file).suffix.lower()
    with Path(file).open("rb") as content:
        if suffix not in COMPRESSED:
            yield content
            return
        compression = importlib.import_module("fsspec.compression").compr
        if COMPRESSED[suffix] not in compression:
            raise ImportError(f"{file} needs a package that reads {suffix}; pip install zstandard")
        try:
            with compression[COMPRESSED[suffix]](content, mode="rb") as expanded:
                yield expanded
        except (EOFError, OSError) as error:
            raise ValueError(f"{file} cannot be expanded: {error}") from error


def _first_bad_byte(file: str, encoding: str) -> tuple[int, str] | None:
    decoder, before = codecs.getincrementaldecoder(encoding)(), 0
    with _binary(file) as content:
        while True:
            chunk = content.read(_CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return before + len(chunk) - len(error.object) + error.start, error.reason
            if not chunk:
                return None
            before += len(chunk)
