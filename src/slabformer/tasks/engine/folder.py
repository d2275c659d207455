"""The output folder of one run: which files it holds, whose run it is, and that one process writes to it."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from slabformer._files import sweep, write_json, write_text
from slabformer._locks import FileLock, acquire
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.documents import parse_json, parse_yaml, read_mapping
from slabformer.tasks.engine.manifest import Manifest
from slabformer.tasks.engine.observers import EVENTS

logger = logging.getLogger(__name__)
Found = Literal["new", "unfinished", "finished"]
LOCK = ".run.lock"
#: keys that every resolved recipe has
RECIPE_KEYS = {"output", "resume", "overwrite", "save_every"}
#: errors of file systems that know no locks
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
#: what versions before workspaces and manifests left in the middle of a write, or in the course of a run
HALF_WRITTEN = re.compile(r"\.(model|part)-[a-z0-9_]{8}|\..+\.(yaml|json|csv|pt|safetensors)\.part")


class FolderInUseError(RuntimeError):
    """Another process writes to the folder of a run."""


class RunFolder:
    """Where a run writes; one folder, one configuration, one process at a time.

    ``manifest.json`` lists what the run wrote, and nothing else is ever deleted.

    Args:
        path: Made if it does not exist.
        config: Plain values, nested.
        harmless: Dotted keys that may differ when a run goes on.
    """

    RESULT: ClassVar[str] = "result.json"
    """Written last: its presence says that the run is finished."""
    OUTPUTS: ClassVar[tuple[str, ...]] = (
        *("metrics.csv", "steps.csv"),
        *("model.safetensors", "ema.safetensors", "best.safetensors"),
    )
    """What else a run writes under a name that is known before."""
    WRITER: ClassVar[str] = "run"
    """What the manifest says wrote the files; a folder of another writer is refused."""

    def __init__(self, path: Path, config: Mapping[str, Any], harmless: Iterable[str] = ()) -> None:
        self.path, self.config, self.harmless = path, json.loads(json.dumps(config)), frozenset(harmless)
        self.manifest = Manifest(path, self.WRITER)

    @property
    def config_path(self) -> Path:
        """The resolved recipe, good for ``slab train --config`` again."""
        return self.path / "config.yaml"

    @property
    def result_path(self) -> Path:
        """Written last: its presence says that the run is finished."""
        return self.path / self.RESULT

    @property
    def reserved(self) -> set[str]:
        """Names that the run writes, which must be free for it."""
        return {self.config_path.name, self.RESULT, *self.OUTPUTS}

    def look(self) -> Found:
        """What is in the folder; nothing is written.

        Raises:
            ValueError: If it belongs to a run with another configuration; names the first key that differs.
        """
        if self.config_path.exists():
            now = fingerprint(self.config, self.harmless)
            before = fingerprint(self._recipe(), self.harmless)
            refuse_difference(before, now, f"{self.path} holds another run")
            if self.result_path.exists():
                return "finished"
        return "unfinished" if self.holds_checkpoint() else "new"

    def holds_checkpoint(self) -> bool:
        """Whether there is a checkpoint, damaged or not."""
        return bool(CheckpointStore(self.path).paths())

    @contextmanager
    def claimed(self, overwrite: bool = False) -> Iterator[None]:
        """Make the folder and hold it alone until the block ends; write the configuration into it.

        What killed processes left half-written is deleted, and with ``overwrite`` the run that was there.

        Raises:
            FolderInUseError: If another process writes to it.
            ValueError: If a file of the user's is in the way.
            OSError: If it cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            sweep(self.path)
            if overwrite:
                self.manifest.delete(self._known())
            known = self._known()
            if self.RESULT in known and self.result_path.exists():
                raise FolderInUseError(
                    f"another process has just finished the run in {self.path}; give the command again"
                )
            self._sweep_old(known)
            self.manifest.refuse_strangers(self.reserved | self._checkpoint_names(), known)
            self.manifest.write(known | {self.config_path.name})
            write_text(self.config_path, yaml.safe_dump(self.config, sort_keys=False))
            yield

    def refuse_if_taken(self) -> None:
        """Say early what would keep :meth:`claimed` from writing to the folder.

        Raises:
            FolderInUseError: If another process writes to it.
            NotADirectoryError: If something else is in its place.
            ValueError: If a file of the user's is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; give another output folder")
        # of several ranks one writes: the others must not take it for another run
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not self.path.exists():
            return
        if (self.path / LOCK).exists():
            with self._locked():
                pass
        self.manifest.refuse_strangers(self.reserved | self._checkpoint_names(), self._known())

    def record(self, *names: str) -> None:
        """Note in the manifest that the run is about to write ``names``; checkpoints that are gone are dropped."""
        known = self._known()
        if not known.issuperset(names):
            kept = {name for name in known if name in self.reserved or (self.path / name).exists()}
            self.manifest.write(kept.union(names))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note ``result``; from now on the run is finished."""
        self.record(self.RESULT)
        write_json(self.result_path, result)

    def result(self) -> dict[str, Any]:
        """What :meth:`finish` noted.

        Raises:
            ValueError: If the file was altered since.
        """
        return read_mapping(self.result_path, parse_json)

    def _recipe(self) -> dict[str, Any]:
        return read_mapping(self.config_path, parse_yaml)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._acquire()
        try:
            yield
        finally:
            if lock is not None:
                lock.release(delete=True)

    def _acquire(self) -> FileLock | None:
        """The folder's lock; None, with a warning, on a file system that has none."""
        path = self.path / LOCK
        try:
            lock = acquire(path)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s is on a file system without locks; let only one process write to it", self.path)
            return None
        if lock is None:
            raise FolderInUseError(
                f"{self.path} is in use by {_owner(path)}; wait until it ends, or choose another output folder"
            )
        lock.write(
            json.dumps(
                {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
            )
        )
        return lock

    def _known(self) -> set[str]:
        """Names of what runs in this folder wrote: of its manifest, or of what an older version's run leaves."""
        return self.manifest.names() if self.manifest.exists else self._written_without_manifest()

    def _written_without_manifest(self) -> set[str]:
        """What is unmistakably of a run of ours, by the recipe beside it and by its exact name."""
        if not self.config_path.is_file() or not self._recipe().keys() >= RECIPE_KEYS:
            return set()
        found = {name for name in self.reserved if (self.path / name).exists()}
        found |= {path.name for path in self.path.glob(EVENTS)}
        return found | self._checkpoint_names()

    def _checkpoint_names(self) -> set[str]:
        return {path.name for path in CheckpointStore(self.path).paths()}

    def _sweep_old(self, known: set[str]) -> None:
        """Delete what a killed run of an older version left half-written."""
        if self.config_path.name not in known:
            return
        for path in self.path.iterdir():
            if HALF_WRITTEN.fullmatch(path.name):
                logger.info("deleting %s, left by a killed run", path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _owner(lock: Path) -> str:
    """Who holds ``lock``, in words."""
    try:
        held = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {held['process']} on {held['host']} (since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet


def refuse_difference(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with a run of other settings; names the first key that differs.

    Raises:
        ValueError: If a key differs or is in one of the two only.
    """
    for key in sorted(now.keys() | before.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            raise ValueError(
                f"{what}: {key} was {old!r}, now {new!r}; "
                "choose another output folder, or pass --overwrite true to start again"
            )


def fingerprint(config: Mapping[str, Any], harmless: Iterable[str] = ()) -> dict[str, Any]:
    """The values of ``config`` by dotted key, without those that may differ when a run goes on."""
    flat = dict(_flatten(config))
    skipped = set(harmless)
    return {key: value for key, value in flat.items() if key not in skipped}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
