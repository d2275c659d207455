"""Memory that a forward gives back and asks for again in the next: the C library can be told to keep it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

# of mallopt, <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_memory() -> bool:
    """Let glibc keep what is freed, in the whole process and for good, instead of returning it to the system.

    It maps what is larger than 32 MiB anew each time, and a page that is new is faulted in and zeroed: the activations
    of a PVT-T's MLPs at batch 8 are 51 MB, and a tenth of its time went there. In turn the process holds on to its peak
    until :func:`give_back`.

    Returns:
        Whether the C library could be told; false where it is not glibc.
    """
    library = _glibc()
    return library is not None and _tell(library, {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER})


def give_back() -> None:
    """Return freed memory to the system now, where the C library is glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _tell(library: ctypes.CDLL, settings: Mapping[int, int]) -> bool:
    return all(library.mallopt(*setting) for setting in settings.items())


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
