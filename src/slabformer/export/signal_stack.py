"""The stack that this thread's signals are handled on, kept as it was while a library puts up one of its own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux, <signal.h>."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """After the block, signals of this thread are handled where they were before it; Linux only, elsewhere nothing.

    OpenVINO's CPU plugin gives the thread that loads it a stack for signals, large enough for AMX registers, and takes
    it away with itself. Two of them that do not go in the reverse order of their coming leave the thread with a stack
    that is no longer mapped, and the next signal that Python handles (Ctrl-C, a child that ends) kills the process
    without a word. Every call that may load the plugin belongs into such a block.
    """
    if sys.platform != "linux":
        yield
        return
    sigaltstack = ctypes.CDLL(None).sigaltstack
    before = _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        # refused where the old one cannot hold AMX registers: then the new one is needed, and stays
        sigaltstack(ctypes.byref(before), None)
