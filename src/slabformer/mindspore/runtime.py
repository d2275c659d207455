"""MindSpore itself: found, in a range of versions that was tried, beside a NumPy that it can live with."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from slabformer._extras import require as require_extra

EXTRA = "mindspore"
#: versions from the first to the second, which is left out
TRIED = ((2, 10), (2, 12))


def require() -> ModuleType:
    """Import MindSpore.

    Raises:
        ImportError: If it is not installed, its version is outside of what was tried, or NumPy is too new for it.
    """
    check_versions(_version("mindspore"), _version("numpy"))
    return require_extra("mindspore", EXTRA)


@contextmanager
def graph_mode(device: str = "auto") -> Iterator[None]:
    """In this block cells are compiled, which is not MindSpore's default; ``device`` "cpu" keeps off an accelerator.

    Raises:
        ValueError: If MindSpore has run on an accelerator in this process, which it cannot leave again.
    """
    mindspore = require()
    if device == "cpu" and mindspore.get_context("device_target") != "CPU":
        try:
            mindspore.set_device("CPU")
        except RuntimeError as error:
            raise ValueError("MindSpore already runs on another device in this process; start a new one") from error
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        yield
    finally:
        mindspore.set_context(mode=before)


def check_versions(mindspore: str | None, numpy: str | None) -> None:
    """Refuse versions that do not work together, before one of them crashes.

    Raises:
        ImportError: See :func:`require`.
    """
    if mindspore is None:
        return  # importing it says what to install
    lowest, beyond = (".".join(map(str, version)) for version in TRIED)
    if not TRIED[0] <= _numbers(mindspore) < TRIED[1]:
        raise ImportError(
            f"slabformer was tried with MindSpore from {lowest} to below {beyond}, found {mindspore}; "
            f"pip install 'slabformer[{EXTRA}]'"
        )
    if numpy is not None and _numbers(numpy) >= (2,):
        raise ImportError(
            f"MindSpore {mindspore} is built for NumPy 1, found {numpy}; pip install 'numpy<2', "
            "in an environment of its own if something else there needs NumPy 2"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
