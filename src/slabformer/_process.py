"""State of the whole process, changed for a block and put back, whichever of several threads ends first."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager


class Shared:
    """A change that several threads may need at the same time: the first makes it, the last takes it back.

    Saving and restoring in each thread would leave the change behind where blocks overlap: the second thread saves
    what the first has changed, and restores it after the first has put things right.

    Args:
        change: Makes the change on entering, and takes it back on leaving.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._inside = 0
        self._open: AbstractContextManager[object] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """For a block."""
        with self._lock:
            if not self._inside:
                self._open = self._change()
                self._open.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._open is not None:
                    opened, self._open = self._open, None
                    opened.__exit__(None, None, None)


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


#: held by what only one thread at a time may do: torch's export flags and generators are the whole process's, and two
#: threads that save and restore them leave them changed
alone = threading.RLock()

#: no warnings, of any thread
no_warnings = Shared(_no_warnings)


@contextmanager
def no_logs(*names: str, below: int = logging.CRITICAL + 1) -> Iterator[None]:
    """Records of this thread under level ``below`` reach no handler from loggers ``names`` and those below them."""
    unwanted = _OfThisThread(names, below)
    handlers = _handlers_of(names)
    for handler in handlers:
        handler.addFilter(unwanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(unwanted)


class _OfThisThread(logging.Filter):
    def __init__(self, names: Sequence[str], below: int) -> None:
        super().__init__()
        self._thread, self._names, self._below = threading.get_ident(), names, below

    def filter(self, record: logging.LogRecord) -> bool:
        unwanted = record.thread == self._thread and record.levelno < self._below
        return not (unwanted and any(record.name == name or record.name.startswith(f"{name}.") for name in self._names))


def _handlers_of(names: Sequence[str]) -> set[logging.Handler]:
    """Every handler that a record of these loggers may reach."""
    below = [
        logger
        for known, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger)
        and any(known == name or known.startswith(f"{name}.") or name.startswith(f"{known}.") for name in names)
    ]
    found = {handler for logger in (*below, logging.root) for handler in logger.handlers}
    return found | ({logging.lastResort} if logging.lastResort is not None else set())
