"""Locks that end with their process, whatever ends it."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

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
