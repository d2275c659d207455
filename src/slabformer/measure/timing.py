"""The measuring itself: interleaved clocks, memory of a forward, multiply-adds, and where it was measured."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from slabformer.measure.allocator import give_back
from slabformer.measure.flops import flop_counter

K = TypeVar("K")
MEBIBYTE = 2**20
#: consecutive calls of one variant in one round: enough of them that a round takes this long
SHORTEST_TURN_SECONDS = 2e-3
WARMUP_ROUNDS = 3
#: whose versions stand beside a figure where they took part in it
REPORTED = ("timm", "transformers", "onnxruntime", "openvino", "executorch")


@dataclass(frozen=True)
class Machine:
    """Where and with what a figure was measured; it stands beside every figure.

    Attributes:
        load: Processes that wanted a core, over the last minute: above ``cores`` the machine was busy with other work.
            None where the system does not tell (Windows).
    """

    device: str
    threads: int
    cores: int
    load: float | None
    versions: dict[str, str]
    command: str
    date: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """This process, on ``device``."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        return cls(
            device=name,
            threads=torch.get_num_threads(),
            cores=os.cpu_count() or 1,
            load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            versions=_versions(),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            date=time.strftime("%Y-%m-%d %H:%M %Z"),
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        load = "unknown" if self.load is None else self.load
        threads = f"{self.threads} thread{'s' * (self.threads != 1)} of {self.cores} cores (load {load})"
        return f"{self.device}, {threads}; {versions}; {self.date}; {self.command}"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def columns(self) -> dict[str, object]:
        """For one row of a table: the versions in one cell."""
        return self.to_dict() | {"versions": " ".join(f"{name}={version}" for name, version in self.versions.items())}


@contextmanager
def num_threads(threads: int | None) -> Iterator[None]:
    """torch's threads within the block; None leaves them."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def time_interleaved(
    calls: Mapping[K, Callable[[], object]], *, seconds: float, device: torch.device, seed: int = 0
) -> dict[K, list[list[float]]]:
    """Time ``calls`` in turns, so that a machine's moods hit all of them alike.

    Each round calls every one of them, in an order drawn anew; a short call is repeated within its turn. The first
    rounds are not counted.

    Args:
        calls: What to time, by any key.
        seconds: How long to go on; at least 5 rounds are measured.
        device: Synchronized around every call.
        seed: Of the orders.

    Returns:
        Seconds of each call: ``result[key][round]`` is the list of that turn.
    """
    turns: dict[K, list[list[float]]] = {key: [] for key in calls}
    repeats = dict.fromkeys(calls, 1)
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    began = time.perf_counter()
    with _no_garbage_collection():
        rounds = -WARMUP_ROUNDS
        while rounds < 5 or time.perf_counter() - began < seconds:
            shuffle(order)
            for key in order:
                turn = [_seconds(calls[key], device) for _ in range(repeats[key])]
                if rounds < 0:
                    repeats[key] = max(1, math.ceil(SHORTEST_TURN_SECONDS / min(turn)))
                else:
                    turns[key].append(turn)
            if rounds < 0:
                began = time.perf_counter()
            rounds += 1
    return turns


def ratio(numerator: list[list[float]], denominator: list[list[float]]) -> float:
    """How many times longer the first takes: median over the rounds of the two turns' ratio."""
    pairs = zip(numerator, denominator, strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def quantile(turns: list[list[float]], q: float) -> float:
    """The ``q`` quantile of all calls, seconds."""
    calls = sorted(call for turn in turns for call in turn)
    return calls[min(len(calls) - 1, math.ceil(q * len(calls)) - 1)]


@torch.no_grad()
def memory_of(call: Callable[[], object], device: torch.device) -> float | None:
    """Most memory (bytes) that ``call`` takes beyond what was held before it, or None where it cannot be measured.

    On a GPU by the allocator's peak, on a CPU by the peak of the process's resident memory, which Linux can reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu" or not _reset_peak_resident():
        return None
    before = _resident("VmRSS")
    call()
    return float(max(0, _resident("VmHWM") - before))


def mebibytes_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float | None:
    """The least :func:`memory_of` of several calls, in MiB."""
    peaks = [peak for peak in (memory_of(call, device) for _ in range(times)) if peak is not None]
    return min(peaks) / MEBIBYTE if peaks else None


@torch.no_grad()
def count_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-adds of matrix products, convolutions and attention in one eager forward."""
    with flop_counter() as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """Elements of the parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _reset_peak_resident() -> bool:
    """Hand freed pages back, then let the peak start again from here; false where the system has no such thing."""
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    versions = {"slabformer": importlib.metadata.version("slabformer"), "torch": str(torch.__version__)}
    used = [name for name in REPORTED if name in sys.modules]
    versions |= {name: importlib.metadata.version(name) for name in used}
    return versions | {"python": platform.python_version()}
