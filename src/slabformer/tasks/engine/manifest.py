"""The list of the files that a command wrote into a folder: nothing else in it is ever deleted."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slabformer._files import write_text
from slabformer.tasks.engine.documents import parse_json, read_mapping

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


class Manifest:
    """``manifest.json`` in a folder: names of what lies beside it.

    Args:
        folder: Where it lies.
        writer: What the list says wrote the files.
    """

    def __init__(self, folder: Path, writer: str) -> None:
        self.folder, self.writer = folder, writer

    @property
    def exists(self) -> bool:
        """Whether there is a list."""
        return (self.folder / MANIFEST).exists()

    def names(self) -> set[str]:
        """The listed names, the manifest's own among them; empty where there is no list.

        Raises:
            ValueError: If the file is no such list, or names something outside of the folder.
        """
        if not self.exists:
            return set()
        found = read_mapping(self.folder / MANIFEST, parse_json)
        names = found.get("files")
        if found.get("writer") != self.writer or not isinstance(names, list) or not all(map(_is_name, names)):
            raise ValueError(
                f"{self.folder / MANIFEST} is not the list of what a {self.writer} wrote; move it, or choose another "
                "output folder"
            )
        return set(names)

    def write(self, names: Iterable[str]) -> None:
        """List ``names``, and nothing else."""
        text = json.dumps({"writer": self.writer, "files": sorted({MANIFEST, *names})}, indent=2)
        write_text(self.folder / MANIFEST, text + "\n")

    def refuse_strangers(self, needed: Iterable[str], known: set[str]) -> None:
        """Refuse to write over a file that is not in ``known``.

        Raises:
            ValueError: If there is a file under one of the ``needed`` names; names the first.
        """
        strangers = sorted(name for name in {MANIFEST, *needed} - known if (self.folder / name).exists())
        if strangers:
            raise ValueError(
                f"{self.folder / strangers[0]} is in the way, and no {self.writer} wrote it; move it, or choose "
                "another output folder"
            )

    def delete(self, names: set[str]) -> None:
        """Delete ``names``, the manifest last: after a kill it still lists the rest."""
        for name in sorted(names - {MANIFEST}):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                logger.info("deleting %s", path)
                shutil.rmtree(path)
            elif path.exists() or path.is_symlink():
                logger.info("deleting %s", path)
                path.unlink()
        if MANIFEST in names:
            (self.folder / MANIFEST).unlink(missing_ok=True)


def _is_name(value: Any) -> bool:
    """Whether an entry is a file's name, and no path out of the folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\:\0")
