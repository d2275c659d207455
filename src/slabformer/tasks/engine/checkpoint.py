"""Checkpoints that survive a crash at any moment and say so when they did not.

A file is one line of header (format, SHA-256 of the rest), then what ``torch.save`` wrote: tensors and plain values,
read with ``weights_only=True``. It appears under its name only when complete and on the disk.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from slabformer.tasks.engine.files import replaced

logger = logging.getLogger(__name__)

MAGIC = b"slabformer checkpoint 1 sha256 "
HEADER_LENGTH = len(MAGIC) + 64 + 1
NAME = re.compile(r"checkpoint-(\d+)\.pt")


class DamagedCheckpointError(RuntimeError):
    """A checkpoint file is truncated or altered."""


class _HashingWriter:
    """What ``torch.save`` needs of a file, hashing on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``, tensors and plain values, to ``path``: complete and on the disk, or not at all.

    Raises:
        OSError: If the disk is full or the folder cannot be written to.
    """
    with replaced(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(bytes(HEADER_LENGTH))
                writer = _HashingWriter(file)
                torch.save(state, cast(BinaryIO, writer))
                file.seek(0)
                file.write(MAGIC + writer.digest.hexdigest().encode() + b"\n")
        except RuntimeError as error:
            # torch wraps the writer's OSError, a full disk say, in a RuntimeError about its zip file
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in ``path``, on the CPU.

    Raises:
        DamagedCheckpointError: If the file is not what was written.
    """
    data = memoryview(path.read_bytes())
    header, payload = bytes(data[:HEADER_LENGTH]), data[HEADER_LENGTH:]
    if header != MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise DamagedCheckpointError(f"{path} is truncated or altered: its checksum does not fit its contents")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


class CheckpointStore:
    """The checkpoints of one run: ``checkpoint-<step>.pt`` in a folder, the last few of them.

    Args:
        folder: Where they lie.
        keep: How many to keep; with one, a damaged file has no predecessor.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """All checkpoints, newest first."""
        found = [(int(match[1]), path) for path in self.folder.glob("*") if (match := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then delete those that are too many."""
        path = self.folder / f"checkpoint-{step}.pt"
        write_checkpoint(path, state)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load_latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest undamaged checkpoint, or None where there is none at all; damaged ones are named and skipped.

        Raises:
            DamagedCheckpointError: If there are checkpoints and every one is damaged.
        """
        paths = self.paths()
        for path in paths:
            try:
                return path, read_checkpoint(path)
            except DamagedCheckpointError as error:
                logger.warning("%s; using the one before", error)
        if paths:
            raise DamagedCheckpointError(
                f"every checkpoint in {self.folder} is damaged; start again with --overwrite true"
            )
        return None
