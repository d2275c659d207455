"""The clock, the memory and the counts."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn

from slabformer.measure.timing import (
    MEBIBYTE,
    Machine,
    count_macs,
    count_parameters,
    memory_of,
    num_threads,
    quantile,
    ratio,
    time_interleaved,
)

CPU = torch.device("cpu")


def test_all_calls_are_timed_in_every_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name) or time.sleep(3e-3)) for name in "abc"}
    turns = time_interleaved(calls, seconds=0.1, device=CPU)
    assert len({len(rounds) for rounds in turns.values()}) == 1
    assert len(turns["a"]) >= 5
    for start in range(0, len(order), 3):
        assert set(order[start : start + 3]) == set("abc")


def test_the_order_changes_between_rounds() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name) or time.sleep(3e-3)) for name in "abc"}
    time_interleaved(calls, seconds=0.1, device=CPU)
    assert len({tuple(order[start : start + 3]) for start in range(0, len(order), 3)}) > 1


def test_short_calls_are_repeated_within_a_turn() -> None:
    turns = time_interleaved({"short": lambda: None, "long": lambda: time.sleep(4e-3)}, seconds=0.05, device=CPU)
    assert len(turns["short"][0]) > 100
    assert len(turns["long"][0]) == 1


def test_ratio_compares_within_rounds() -> None:
    # the machine is ten times slower in half of the rounds: medians alone would not see that b takes twice as long
    a = [[1.0], [10.0], [1.0], [10.0], [10.0]]
    b = [[2.0], [20.0], [2.0], [20.0], [20.0]]
    assert ratio(b, a) == 2.0


@pytest.mark.parametrize(("q", "expected"), [(0.5, 5.0), (0.9, 9.0), (1.0, 10.0)])
def test_quantile_is_over_all_calls(q: float, expected: float) -> None:
    assert quantile([[10.0, 1.0, 5.0], [4.0, 2.0, 3.0], [9.0, 8.0, 7.0, 6.0]], q) == expected


def test_memory_is_what_a_call_takes_beyond_what_was_held() -> None:
    held = torch.ones(64 * MEBIBYTE // 4)
    taken = memory_of(lambda: torch.ones(48 * MEBIBYTE // 4).sum() + held[0], CPU)
    if taken is None:
        pytest.skip("this system cannot reset a process's peak memory")
    assert 47 <= taken / MEBIBYTE <= 56


def test_macs_are_multiply_adds_of_one_forward() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    assert count_macs(model, (torch.randn(3, 8),)) == 3 * (8 * 16 + 16 * 4)


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(8, 8)
    assert count_parameters(nn.Sequential(layer, layer)) == 72


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_machine_names_processor_versions_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/slab", "bench", "my model"])
    text = str(Machine.here(CPU))
    assert f"torch {torch.__version__}" in text
    assert "thread" in text
    assert text.endswith("slab bench 'my model'")


def test_a_system_without_load_averages_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg")
    machine = Machine.here(CPU)
    assert machine.load is None
    assert "load unknown" in str(machine)
