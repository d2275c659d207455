"""Signals still find their stack after OpenVINO has come and gone."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems' signal stacks are left alone")

RESTORED = """
import ctypes
from slabformer.export.signal_stack import _Stack, signal_stack_kept

libc = ctypes.CDLL(None)
stacks = [ctypes.create_string_buffer(1 << 16) for _ in range(2)]

def put(index):
    assert libc.sigaltstack(ctypes.byref(_Stack(ctypes.addressof(stacks[index]), 0, 1 << 16)), None) == 0

def current():
    stack = _Stack()
    assert libc.sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.address

put(0)
with signal_stack_kept():
    put(1)
    assert current() == ctypes.addressof(stacks[1])
assert current() == ctypes.addressof(stacks[0])
try:
    with signal_stack_kept():
        put(1)
        raise KeyError
except KeyError:
    assert current() == ctypes.addressof(stacks[0])
"""

OPENVINO = """
import signal, torch
from slabformer.quantize.openvino import quantize, to_openvino
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
model, images = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
first = to_openvino(model, images)
first(images)
second = quantize(model, [images])
second(images)
del first
second = None
signal.raise_signal(signal.SIGUSR1)
assert heard
"""


def run(code: str) -> None:
    """In a process of its own, which no fault handler has given a stack."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"


def test_the_stack_before_the_block_is_the_stack_after_it() -> None:
    run(RESTORED)


def test_a_signal_after_two_models_of_openvino_is_handled() -> None:
    pytest.importorskip("openvino")
    run(OPENVINO)
