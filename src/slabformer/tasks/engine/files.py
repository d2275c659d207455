"""Files that are either complete or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

TEMPORARY = ".part"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes ``path``'s place when the block ends, and vanishes if it fails.

    The file is on the disk before it is renamed, the rename before the block is left: a crash at any moment leaves
    the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # some writers put a file of their own there that nobody else may read
        sync_file(temporary)
        os.replace(temporary, path)  # noqa: PTH105 - the one call that is atomic on every platform
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replaced_with(path: Path, companion: Path) -> Iterator[Path]:
    """:func:`replaced` for a file that may come with another one, which it names, as ONNX names its weights.

    What the block writes into the folder of the path that it gets, under the two files' own names, takes their places.
    The two never stand beside each other unless they belong together: ``path`` is away while ``companion`` moves.
    """
    with TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        beside = temporary.with_name(companion.name)
        for file in (temporary, beside):
            if file.exists():
                sync_file(file)
        if beside.exists() or companion.exists():
            path.unlink(missing_ok=True)
            companion.unlink(missing_ok=True)
        for source, target in ((beside, companion), (temporary, path)):
            if source.exists():
                os.replace(source, target)  # noqa: PTH105 - the one call that is atomic on every platform
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, all of it or nothing."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """The text in ``path``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error


def sync_file(path: Path) -> None:
    """Wait until the contents of ``path`` are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Delete what a killed process left half-written in ``folder``."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)
