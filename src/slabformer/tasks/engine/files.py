"""Files that are either complete or not there."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slabformer._files import WORKSPACE, sync_file, sync_folder, workspace
from slabformer._listing import check_regular

WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
#: how libraries in Rust and C++ spell an error of the operating system
OS_ERROR = re.compile(r"os error (\d+)|Os \{ code: (\d+)")
TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to; what is there when the block ends takes ``path``'s place, and nothing does if it fails.

    The file is on the disk before it is renamed, the rename before the block is left: a crash at any moment leaves
    the old file or the new one, and what else it leaves is deleted when a file is next written to the folder.

    Raises:
        OSError: If the file cannot be written, naming ``path``; also for what other libraries call such a failure.
    """
    with errors_of(path), workspace(path.parent) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers put a file of their own there that nobody else may read
        sync_file(temporary)
        os.replace(temporary, path)  # noqa: PTH105 - the one call that is atomic on every platform
    sync_folder(path.parent)


@contextmanager
def replaced_with(path: Path, companion: Path) -> Iterator[Path]:
    """:func:`replaced` for a file that may come with another one, which it names, as ONNX names its weights.

    What the block writes into the folder of the path that it gets, under the two files' own names, takes their places.
    The two never stand beside each other unless they belong together: ``path`` is away while ``companion`` moves.
    """
    with errors_of(path), workspace(path.parent) as folder:
        temporary = folder / path.name
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


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Tell a failure to write to a workspace, in whatever library, as an ``OSError`` about ``path``."""
    try:
        yield
    except Exception as error:
        code = _errno_of_write(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def _errno_of_write(error: Exception) -> int | None:
    """The operating system's number of what went wrong in writing; None if it was something else."""
    # torch wraps the error of a Python file in a RuntimeError about its own format
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError):
        file = None if cause.filename is None else Path(str(cause.filename))
        if file is None:
            return cause.errno if cause.errno in WRITE_ERRORS else None
        return cause.errno if any(WORKSPACE.fullmatch(part) for part in file.parts) else None
    number = OS_ERROR.search(str(error))
    if number is not None:
        return int(number[1] or number[2])
    return errno.EIO if TORCH_WRITER.search(str(error)) else None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, all of it or nothing."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """The text in ``path``, without its byte order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it is no regular file: a named pipe, a device.
        ValueError: If it is no text.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
