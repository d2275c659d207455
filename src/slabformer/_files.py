"""Files that are complete or absent: the one way in which this library writes."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slabformer._listing import check_regular
from slabformer._locks import FileLock, acquire

#: what :func:`workspace` makes
WORKSPACE = re.compile(r"\.slabformer-[0-9a-f]{16}\.part")
OWNER = "owner.lock"
#: after which a workspace of another host is abandoned
PATIENCE_SECONDS = 3600.0
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
#: how libraries in Rust and C++ spell an error of the operating system
OS_ERROR = re.compile(r"os error (\d+)|Os \{ code: (\d+)")
TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to; what is there when the block ends takes ``path``'s place, and nothing does if it fails.

    The file is on the disk before it is renamed, the rename before the block is left: a crash at any moment leaves
    the old file or the new one, and what else it leaves is deleted when a file is next written to the folder. A link
    stays, and the file that it leads to is replaced.

    Raises:
        OSError: If the file cannot be written, naming ``path``; also for what other libraries call such a failure.
        NotRegularError: If ``path`` is a folder, a named pipe, a device.
    """
    path = _target(path)
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

    Raises:
        OSError: As :func:`replaced` does.
    """
    path, companion = _target(path), _target(companion)
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


def _target(path: Path) -> Path:
    """What a link leads to, or ``path``; a rename would put a file in the place of a device just as of a file."""
    if path.exists():
        check_regular(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def replaced_folder(path: Path, owned: Collection[str] | None = None) -> Iterator[Path]:
    """:func:`replaced` for a folder: what the block puts into the one that it gets takes ``path``'s place, as a whole.

    Args:
        path: Absent, an empty folder, or one that holds nothing but files of the names ``owned``, which go.
        owned: None where an empty folder alone may be replaced.

    Raises:
        FileExistsError: As :func:`check_replaceable`.
        OSError: If it cannot be written, naming ``path``.
    """
    check_replaceable(path, owned)
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors_of(path), workspace(path.parent) as place:
        fresh, old = place / "new", place / "old"
        fresh.mkdir()
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                sync_file(file)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    sync_folder(path.parent)


def check_replaceable(path: Path, owned: Collection[str] | None) -> None:
    """What :func:`replaced_folder` says of a ``path`` that it would not replace, before anything is made for it.

    Raises:
        FileExistsError: If ``path`` is a file, holds something although ``owned`` is None, or something else than that.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file; give a folder")
    held = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    if owned is None and held:
        raise FileExistsError(f"{str(path)!r} is not empty; give another folder, or say to overwrite it")
    strangers = [name for name in held if name not in (owned or ()) or (path / name).is_dir()]
    if strangers:
        raise FileExistsError(
            f"{str(path)!r} holds {strangers[0]!r}, which overwriting would delete; move it, or give another folder"
        )


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


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, all of it or nothing."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """``value`` as indented JSON; what is no text in a name, such as bytes of another encoding, is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write ``rows`` to ``path`` below a line of ``columns``, all of it or nothing; what a row lacks is empty."""
    with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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


def check_readable(path: str | os.PathLike[str], what: str = "file") -> Path:
    """``path``, if it is a file that can be read; libraries in other languages say "no such file" of both.

    Raises:
        FileNotFoundError: If there is none.
        IsADirectoryError: If it is a folder.
        PermissionError: If reading it is not allowed.
        NotRegularError: If it is a named pipe or a device, which may block whoever opens it.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        check_regular(path)
    try:
        with path.open("rb"):
            return path
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {what} at {str(path)!r}: no such file") from error
    except PermissionError as error:
        if path.is_dir():  # what Windows calls opening a folder
            raise IsADirectoryError(f"{str(path)!r} is a folder; give a file") from error
        raise PermissionError(f"no permission to read {str(path)!r}") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{str(path)!r} is a folder; give a file") from error


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A folder inside ``folder`` for files that are not complete yet; it is gone when the block ends.

    What killed processes left of this kind in ``folder`` is deleted first, see :func:`sweep`.

    Raises:
        OSError: If ``folder`` cannot be written to.
    """
    sweep(folder)
    place, lock = _make_workspace(folder)
    try:
        yield place
    finally:
        if lock is not None:
            lock.release()
        shutil.rmtree(place, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete the workspaces in ``folder`` whose processes have ended; nothing else is touched."""
    try:
        with os.scandir(folder) as entries:
            found = [e.path for e in entries if WORKSPACE.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return  # whoever writes there next says what is wrong
    for place in map(Path, found):
        try:
            lock = acquire(place / OWNER)
        except OSError:
            continue  # of another user, gone already, or on a file system without locks: its owner may be alive
        if lock is not None:
            abandoned = _is_of_this_host(place) or _seconds_since_change(place) > PATIENCE_SECONDS
            lock.release()
            if abandoned:
                shutil.rmtree(place, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Wait until the contents of ``path`` are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk; Windows, which opens no folders, does so by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_workspace(folder: Path) -> tuple[Path, FileLock | None]:
    """A new workspace and its lock, None on a file system that has none."""
    while True:
        place = folder / f".slabformer-{secrets.token_hex(8)}.part"
        place.mkdir()
        try:
            lock = acquire(place / OWNER)
        except FileNotFoundError:
            continue  # another process took it for abandoned before it was locked
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                shutil.rmtree(place, ignore_errors=True)
                raise
            return place, None
        if lock is not None:
            lock.write(socket.gethostname())
            return place, lock


def _is_of_this_host(place: Path) -> bool:
    """Whether a workspace's lock, if it were held, would be seen here: some network file systems lock within a host."""
    try:
        return (place / OWNER).read_text(encoding="utf-8") in ("", socket.gethostname())
    except (OSError, ValueError):
        return False


def _seconds_since_change(place: Path) -> float:
    """Since a file in a workspace was written, by the clock of the file system."""
    try:
        last = max(entry.stat().st_mtime for entry in place.rglob("*"))
        (place / OWNER).touch()
        return (place / OWNER).stat().st_mtime - last
    except OSError:
        return 0.0
