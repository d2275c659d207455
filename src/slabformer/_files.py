"""Files that are complete or absent, and locks that end with their process, whatever ends it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slabformer._listing import check_regular

if sys.platform == "win32":
    import msvcrt

    #: a byte far behind the contents: others may read the file while it is locked
    LOCKED_BYTE = 1 << 30

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


HELD_BY_OTHERS = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
#: what :func:`workspace` makes
WORKSPACE = re.compile(r"\.slabformer-[0-9a-f]{16}\.part")
OWNER = "owner.lock"
#: after which a workspace of another host is abandoned
PATIENCE_SECONDS = 3600.0
_held: set[int] = set()


class FileLock:
    """An exclusive lock of this process on a file. The operating system drops it when the process ends, also by a kill.

    Made by :func:`acquire`.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor, self._process = path, descriptor, os.getpid()
        _held.add(descriptor)

    def write(self, text: str) -> None:
        """Replace the contents of the file, for whoever finds it locked."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, text.encode())

    def release(self, *, delete: bool = False) -> None:
        """Let go, and ``delete`` the file; a forked child, which never held the lock, does nothing."""
        if self._process != os.getpid() or self._descriptor not in _held:
            return
        if delete and os.name != "nt":  # while it is ours; Windows deletes no open file
            self.path.unlink(missing_ok=True)
        _unlock(self._descriptor)  # at once, also if a child that was just forked has not let go
        _close(self._descriptor)
        if delete and os.name == "nt":
            _unlink_if_free(self.path)


def acquire(path: Path) -> FileLock | None:
    """Lock ``path``, which is created if need be, or return None if another process, or this one, holds it.

    Raises:
        OSError: If the file cannot be opened, or its file system has no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if _is_at(descriptor, path):
                return FileLock(path, descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in HELD_BY_OTHERS:
                return None
            raise
        os.close(descriptor)  # its owner deleted it between the two calls; the next one is a new file


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


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unlink_if_free(path: Path) -> None:
    with suppress(OSError):  # the next owner has it open
        path.unlink(missing_ok=True)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _let_go_in_child() -> None:
    """A forked child shares its parent's descriptors: left open, they would keep the locks of a parent that died."""
    for descriptor in tuple(_held):
        _close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


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
