"""Checkpoints that survive a crash at any moment and say so when they did not.

A file of ours is one line of header (format, SHA-256 of the rest), then what ``torch.save`` wrote: tensors and plain
values, read with ``weights_only=True``. A folder that another library wrote has ``checksums.json`` beside its files.
Both appear under their names only when complete and on the disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import re
import shutil
from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

import torch

from slabformer._files import errors_of, replaced, sync_file, sync_folder, workspace
from slabformer._listing import check_regular

logger = logging.getLogger(__name__)

MAGIC = b"slabformer checkpoint 1 sha256 "
HEADER_LENGTH = len(MAGIC) + 64 + 1
CHECKSUMS = "checksums.json"
#: what transformers' Trainer writes last into a checkpoint
LAST_FILE = "trainer_state.json"
State = TypeVar("State")


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
    with replaced(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER_LENGTH))
        writer = _HashingWriter(file)
        torch.save(state, cast(BinaryIO, writer))
        file.seek(0)
        file.write(MAGIC + writer.digest.hexdigest().encode() + b"\n")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in ``path``, on the CPU.

    Raises:
        DamagedCheckpointError: If the file is not what was written.
    """
    check_regular(path)
    data = memoryview(path.read_bytes())
    header, payload = bytes(data[:HEADER_LENGTH]), data[HEADER_LENGTH:]
    if header != MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise DamagedCheckpointError(f"{path} is truncated or altered: its checksum does not fit its contents")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedCheckpointError(f"{path} holds other things than tensors and plain values: {reason}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"{path} holds {type(state).__name__}, not the state of a run")
    return state


class Checkpoints(ABC):
    """The checkpoints of one run in its folder, the last few of them.

    Args:
        folder: Where they lie.
        keep: How many to keep; with one, a damaged checkpoint has no predecessor. None keeps all.
        record: Told the name of each before it appears.
    """

    NAME: ClassVar[re.Pattern[str]]
    """Of a checkpoint; its group is the step."""

    def __init__(self, folder: Path, keep: int | None = 2, record: Callable[[str], None] | None = None) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        self.folder, self.keep = folder, keep
        self._record = record if record is not None else lambda name: None

    def paths(self) -> list[Path]:
        """All checkpoints, newest first: by their steps, since clocks can be set back."""
        found = [(int(match[1]), path) for path in self.folder.glob("*") if (match := self.NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def prune(self) -> None:
        """Delete those that are too many."""
        for old in self.paths()[self.keep :] if self.keep is not None else []:
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)

    def newest(self, read: Callable[[Path], State]) -> tuple[Path, State] | None:
        """The newest checkpoint that ``read`` finds undamaged, or None where there is none at all.

        Damaged ones are named and skipped.

        Raises:
            DamagedCheckpointError: If there are checkpoints and every one is damaged.
        """
        paths = self.paths()
        for path in paths:
            try:
                return path, read(path)
            except DamagedCheckpointError as error:
                logger.warning("%s; using the one before", error)
        if paths:
            raise DamagedCheckpointError(
                f"every checkpoint in {self.folder} is damaged; start again with --overwrite true"
            )
        return None


class CheckpointStore(Checkpoints):
    """Checkpoints that are files, ``checkpoint-<step>.pt``."""

    NAME = re.compile(r"checkpoint-(\d+)\.pt")

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then delete those that are too many."""
        path = self.folder / f"checkpoint-{step}.pt"
        self._record(path.name)
        write_checkpoint(path, state)
        self.prune()
        return path

    def load_latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest undamaged checkpoint and its state: see :meth:`Checkpoints.newest`."""
        return self.newest(read_checkpoint)


class CheckpointFolders(Checkpoints):
    """Checkpoints that another library writes as folders, ``checkpoint-<step>``, with the checksums of their files."""

    NAME = re.compile(r"checkpoint-(\d+)")

    def name(self, step: int) -> str:
        """Of the checkpoint of ``step``."""
        return f"checkpoint-{step}"

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder for :meth:`keep_from` that is gone when the block ends; it lies where a rename is enough.

        Raises:
            OSError: If the disk is full or the folder cannot be written to, naming the checkpoint of ``step``.
        """
        with self.errors_of(step), workspace(self.folder) as place:
            yield place

    def errors_of(self, step: int) -> AbstractContextManager[None]:
        """Around what writes the checkpoint of ``step``: failures name it."""
        return errors_of(self.folder / self.name(step))

    def keep_from(self, place: Path, step: int) -> Path:
        """Make the folder of ``step`` inside ``place`` a checkpoint, then delete those that are too many.

        Its contents and their checksums are on the disk before it appears under its name.
        """
        written, path = place / self.name(step), self.folder / self.name(step)
        write_checksums(written)
        self._record(path.name)
        if path.exists():  # a damaged one of the same step
            path.rename(place / "replaced")
        written.rename(path)
        sync_folder(self.folder)
        self.prune()
        return path

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint: see :meth:`Checkpoints.newest`."""
        found = self.newest(check_checksums)
        return None if found is None else found[0]


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json``, of all files in ``folder``, when they are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        sync_file(file)
    digests = {path.relative_to(folder).as_posix(): _sha256_of(path) for path in files}
    checksums = folder / CHECKSUMS
    checksums.write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")
    sync_file(checksums)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)


def check_checksums(folder: Path) -> None:
    """Compare the files in ``folder`` with its ``checksums.json``; one that has none is taken with a warning.

    Raises:
        DamagedCheckpointError: If a file is missing or is not what was written.
    """
    checksums = folder / CHECKSUMS
    if not checksums.exists():
        if not (folder / LAST_FILE).exists():
            raise DamagedCheckpointError(f"{folder} was not written to its end")
        logger.warning(
            "%s has no %s and cannot be checked; slabformer did not write it, or an old one", folder, CHECKSUMS
        )
        return
    try:
        digests = json.loads(checksums.read_bytes())["sha256"]
        wrong = [name for name, digest in digests.items() if _sha256_of(folder / name) != digest]
    except (ValueError, KeyError, TypeError, AttributeError):
        wrong = [CHECKSUMS]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        wrong = [Path(error.filename).name]
    if wrong:
        raise DamagedCheckpointError(
            f"{folder / wrong[0]} is missing, truncated or altered: its checksum does not fit its contents"
        )


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
