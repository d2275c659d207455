"""YAML and JSON that others may have written, read within bounds: no value is larger than the text that spells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from slabformer._files import read_text

#: of a YAML text: characters, values once aliases are written out, and how deep they lie in each other
MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 2**22, 100_000, 64


def check_yaml(text: str) -> None:
    """Refuse YAML that becomes more than it looks, before anything is built of it: aliases of aliases, deep nesting.

    Raises:
        ValueError: If it is too long, too deep, or holds too many values once its aliases are written out.
        yaml.YAMLError: If it is no YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read")
    finished: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in finished and any(anchor == event.anchor for anchor, _ in open_nodes):
                raise ValueError(f"alias *{event.anchor} holds itself (line {event.start_mark.line + 1})")
            total += finished.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                finished[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                finished[event.anchor] = 1
        if len(open_nodes) > MAX_DEPTH or total > MAX_VALUES:
            what = (
                f"is nested deeper than {MAX_DEPTH} levels"
                if total <= MAX_VALUES
                else (f"holds more than {MAX_VALUES:,} values, its aliases written out")
            )
            raise ValueError(f"it {what} (line {event.start_mark.line + 1})")


def parse_yaml(text: str) -> Any:
    """The value that ``text`` spells in YAML.

    Raises:
        ValueError: If it is out of bounds; see :func:`check_yaml`.
        yaml.YAMLError: If it is no YAML.
    """
    check_yaml(text)
    return yaml.safe_load(text)


def parse_json(text: str) -> Any:
    """The value that ``text`` spells in JSON.

    Raises:
        ValueError: If it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """The value in the JSON file ``path``.

    Raises:
        OSError: If there is no such file, or it is no regular one.
        ValueError: If it is no JSON; names the file.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What ``parse`` makes of the text in ``path``.

    Raises:
        ValueError: If it is not text, does not parse, or is no mapping; names the file.
    """
    try:
        value = parse(read_text(path))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} cannot be read: it holds {type(value).__name__}, not keys and values")
    return value
