"""The floor under a latency: known work, and ceilings that a machine can have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slabformer.bench.compare import compare
from slabformer.measure import roofline
from slabformer.measure.roofline import Ceilings, Work, measure_ceilings, work_of
from small_models import images, trained_looking

CPU = torch.device("cpu")


def test_a_linear_reads_operands_and_writes_its_result_once() -> None:
    work = work_of(nn.Sequential(nn.Linear(8, 16), nn.GELU()), torch.randn(3, 8))
    assert work == Work(flops=2 * 3 * 8 * 16, bytes=4 * (3 * 8 + 8 * 16 + 16 + 3 * 16))


def test_a_broadcast_operand_counts_what_lies_in_memory() -> None:
    one, other = torch.randn(1, 5, 4), torch.randn(6, 4, 2)
    assert work_of(torch.bmm, one.expand(6, 5, 4), other).bytes == 4 * (5 * 4 + 6 * 4 * 2 + 6 * 5 * 2)


def test_attention_and_convolution_have_work() -> None:
    heads = torch.randn(2, 3, 10, 8)
    assert work_of(F.scaled_dot_product_attention, heads, heads, heads).bytes >= 4 * 4 * heads.numel()
    assert work_of(nn.Conv2d(3, 4, 2), torch.randn(1, 3, 5, 5)).flops == 2 * 4 * 4 * 4 * 3 * 2 * 2


def test_the_floor_is_the_larger_of_two_times() -> None:
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0)
    assert Work(flops=200, bytes=10).floor(ceilings) == 2.0
    assert Work(flops=200, bytes=30).floor(ceilings) == 3.0


def test_what_a_machine_reached_once_it_can_reach() -> None:
    one, other = Ceilings(flops_per_s=2.0, bytes_per_s=3.0), Ceilings(flops_per_s=4.0, bytes_per_s=1.0)
    assert one.or_better(other) == Ceilings(flops_per_s=4.0, bytes_per_s=3.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "LARGE", {"cpu": (256, 2**22)})


@pytest.mark.usefixtures("small")
def test_ceilings_are_measured_and_a_product_takes_about_its_floor() -> None:
    ceilings = measure_ceilings(CPU, seconds=0.2)
    assert 1e8 < ceilings.flops_per_s < 1e15
    assert 1e7 < ceilings.bytes_per_s < 1e14
    assert "GFLOP/s" in str(ceilings)


@pytest.mark.usefixtures("small")
def test_a_benchmark_tells_each_variants_share_of_the_floor() -> None:
    report = compare(trained_looking(), images(), roofline=True, batch_sizes=(1,), compiled=False, seconds=0.02)
    assert all(row.of_floor is not None and row.of_floor > 0 for row in report)
    assert any("large matrix product" in note for note in report.notes)
