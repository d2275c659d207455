"""SIGTERM and SIGINT end training after the current step, with everything saved."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

HANDLED = (signal.SIGTERM, signal.SIGINT)


class StoppedError(RuntimeError):
    """A signal ended the run; ``exit_code`` is what a shell expects then: 143 for SIGTERM, 130 for SIGINT."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """Notes SIGTERM and SIGINT while active; a second one ends the process as it would have without us.

    Outside the main thread signals cannot be caught: there it notes nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in HANDLED}
        if dist.is_initialized() and dist.get_world_size() > 1:
            # a group of its own on the CPU: agreeing must not wait for the accelerator
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; every rank gets the same answer and must ask equally often."""
        if self._group is None:
            return self.received
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


def leave_signals_to_parent(worker: int = 0) -> None:
    """Let a loader's worker outlive the signals that a terminal or a scheduler sends to the whole group.

    Its parent finishes the step, for which it needs the worker, and ends it afterwards. SIGTERM is told by its sender,
    which Linux alone names; elsewhere it ends the worker, whoever sent it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_told, args=(parent.pid,), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


def _exit_when_told(parent: int) -> None:
    """Wait for the parent's SIGTERM, and for no one else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def held_back() -> Iterator[None]:
    """Deliver signals after the block. Processes that start in it have them blocked, while they import for seconds."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # starting it in the block would unblock them, up to Python 3.12
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
