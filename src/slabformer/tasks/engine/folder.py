"""The output folder of one run: which files it holds, and whose run it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from slabformer.tasks.engine.files import sweep, write_text

logger = logging.getLogger(__name__)
Found = Literal["new", "unfinished", "finished"]


class RunFolder:
    """Where a run writes; one folder, one configuration.

    Args:
        path: Made if it does not exist.
        config: Plain values, nested.
        harmless: Dotted keys that may differ when a run goes on.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], harmless: Iterable[str] = ()) -> None:
        self.path, self.config, self.harmless = path, json.loads(json.dumps(config)), frozenset(harmless)

    @property
    def config_path(self) -> Path:
        """The resolved recipe, good for ``slab train --config`` again."""
        return self.path / "config.yaml"

    @property
    def result_path(self) -> Path:
        """Written last: its presence says that the run is finished."""
        return self.path / "result.json"

    def look(self) -> Found:
        """What is in the folder; nothing is written.

        Raises:
            ValueError: If it belongs to a run with another configuration; names the first key that differs.
            NotADirectoryError: If something else is in its place.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; give another output folder")
        if self.config_path.exists():
            given = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
            now = fingerprint(self.config, self.harmless)
            refuse_difference(fingerprint(given, self.harmless), now, f"{self.path} holds another run")
        if self.result_path.exists():
            return "finished"
        return "unfinished" if any(self.path.glob("checkpoint-*.pt")) else "new"

    def claim(self, overwrite: bool = False) -> None:
        """Make the folder and write the configuration into it; ``overwrite`` deletes the run that was there.

        Raises:
            OSError: If it cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        sweep(self.path)
        if overwrite:
            self._clear()
        write_text(self.config_path, yaml.safe_dump(self.config, sort_keys=False))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note ``result``; from now on the run is finished."""
        write_text(self.result_path, json.dumps(result, indent=2) + "\n")

    def result(self) -> dict[str, Any]:
        """What :meth:`finish` noted."""
        return json.loads(self.result_path.read_text(encoding="utf-8"))

    def _clear(self) -> None:
        for pattern in ("config.yaml", "result.json", "checkpoint-*.pt", "*.safetensors", "*.csv", "events.out.*"):
            for path in self.path.glob(pattern):
                logger.info("deleting %s", path)
                path.unlink()


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
