"""Freed memory that is kept: once a process has its peak, no page is faulted in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slabformer.measure import allocator

# without torch: what holds for its tensors holds for any 64 MiB
PROGRAM = """
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])
allocator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(allocator)
if sys.argv[2] == "keep":
    assert allocator.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"1") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *_, settled = [faults() for _ in range(16)]
allocator.give_back()
print(first, settled, faults())
"""


def faults(argument: str) -> list[int]:
    """Pages faulted in for the first 64 MiB, for the same the sixteenth time, and once the memory was given back."""
    command = [sys.executable, "-c", PROGRAM, allocator.__file__, argument]
    return [int(word) for word in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


@pytest.mark.skipif(allocator._glibc() is None, reason="the C library is not glibc")
def test_kept_memory_is_not_faulted_in_again_until_it_is_given_back() -> None:
    first, settled, _ = faults("usual")
    assert settled > first / 2  # what it is there for
    first, settled, given_back = faults("keep")
    assert settled < first / 10
    assert given_back > first / 2


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert not allocator.keep_memory()
    allocator.give_back()
