"""What the processor at hand can do, by the names that Linux has for it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

#: instruction sets that compilers and kernels choose by: vectors, half precision and integers
CHOSEN_BY = re.compile(r"(avx|fma|f16c|amx|sse4|bmi|vnni|asimd|sve|bf16|i8mm|sme)")
CPU_INFO = Path("/proc/cpuinfo")


def architecture() -> str:
    """``x86_64`` or ``arm64``, however the system spells it."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "aarch64": "arm64"}.get(name, name)


def instructions() -> tuple[str, ...]:
    """Instruction sets of this processor that programs may hold; none where the system does not tell."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return tuple(sorted(flag for flag in flags.split() if CHOSEN_BY.search(flag)))
