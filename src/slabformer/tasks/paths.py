"""File names that come from data stay in the folder that they are given for."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path, PureWindowsPath


def path_inside(folder: Path, name: object) -> Path:
    """``folder / name``, where ``name`` comes from a file that somebody else wrote.

    Links among the folders above ``folder`` are the user's own and are followed; ``folder`` itself may be one.

    Raises:
        ValueError: If ``name`` is no text, is absolute, steps up, or leads out of ``folder`` through a link.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file")
    windows = PureWindowsPath(name)  # which takes both kinds of slashes
    if windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{name!r} leaves the folder {str(folder)!r}: give names below it, without '..'")
    path = folder / name
    root, parent = _real(folder), _real(path.parent)
    target = Path(os.path.realpath(path)) if path.is_symlink() else parent / path.name
    if not target.is_relative_to(root):
        raise ValueError(f"{name!r} leaves the folder {str(folder)!r}: it is a link to {str(target)!r}; copy the file")
    return path


@lru_cache(maxsize=4096)
def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))
