"""Child processes of tests."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ended(processes: Collection[subprocess.Popen[Any]]) -> Iterator[None]:
    """Let none of ``processes`` outlive its test: one that still ran would fail the test that comes next."""
    try:
        yield
    finally:
        for process in processes:
            with process:  # closes its pipes and waits
                process.kill()
