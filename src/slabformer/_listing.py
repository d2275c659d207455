"""What lies in a folder of data: regular files, whatever the case of their suffixes, each folder once."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable
from pathlib import Path

#: what operating systems leave in folders beside their hidden files
JUNK = frozenset({"thumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found", "$recycle.bin"})
#: what is no regular file, in words
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularError(OSError):
    """What stands at a path could block a reader for good, or has no end."""


def check_regular(path: str | Path) -> None:
    """Refuse what is no regular file: named pipes, sockets, devices and folders, which may block whoever opens them.

    Raises:
        NotRegularError: If it is none.
        FileNotFoundError: If nothing is there.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 - once an image
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in KINDS if is_kind(mode)), "no file")
        raise NotRegularError(f"{path} is {kind}, not a regular file; give a file on the disk")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, as macOS's ``._x.jpg`` are, or an operating system's own."""
    return name.startswith(".") or name.lower() in JUNK


def files_below(folder: str | Path, wanted: Callable[[str], bool]) -> list[str]:
    """Paths of the regular files below ``folder`` whose names are ``wanted``, sorted; hidden ones are left out.

    Links are followed, but into no folder twice and never to a folder that holds ``folder``.

    Raises:
        OSError: If a folder cannot be read.
    """
    top = Path(folder)
    seen = {_identity(place) for place in (top, *top.resolve().parents)}
    found: list[str] = []
    left = [os.fspath(folder)]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    identity = _identity(entry.path)
                    if identity not in seen:
                        seen.add(identity)
                        left.append(entry.path)
                elif wanted(entry.name) and entry.is_file():
                    found.append(entry.path)
    return sorted(found)


def folders_in(folder: Path) -> list[Path]:
    """The folders in ``folder``, sorted; hidden ones, and links to it or to one that holds it, are left out."""
    above = {_identity(place) for place in (folder, *folder.resolve().parents)}
    places = (place for place in folder.iterdir() if not is_hidden(place.name) and place.is_dir())
    return sorted(place for place in places if _identity(place) not in above)


def matches(pattern: str) -> list[str]:
    """Paths that ``pattern`` means, sorted: the file or folder of that very name, or those that match it as a glob.

    The folder in front is taken as it is called where it exists, ``lm[v2]/*.txt``; ``**`` is any number of folders.
    """
    if Path(pattern).exists():
        return [pattern]
    parts = Path(pattern).parts
    for count in range(len(parts) - 1, 0, -1):
        folder = Path(*parts[:count])
        if folder.is_dir():
            rest = str(Path(*parts[count:]))
            return sorted(glob.glob(f"{glob.escape(str(folder))}{os.sep}{rest}", recursive=True))  # noqa: PTH207
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - patterns may start at the root


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116 - a million folders
    return found.st_dev, found.st_ino
