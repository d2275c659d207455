"""Starts the tests of the Triton kernels in Triton's interpreter, which takes kernels apart on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNEL_TESTS = [str(Path(__file__).with_name(f"test_triton_{name}.py")) for name in ("kernels", "operator")]


@pytest.mark.parametrize(
    "markers",
    ["not slow and not gpu", pytest.param("slow and not gpu", marks=pytest.mark.slow)],
    ids=["fast", "slow"],
)
def test_kernels_pass_in_the_interpreter(markers: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers, *KERNEL_TESTS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
