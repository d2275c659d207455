"""Figures show what they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from slabformer.bench.report import BenchReport
from slabformer.figures.plots import curves, gamma_over_time, norm_map, save, to_svg
from slabformer.measure.rows import Measurement, Mode, Variant
from slabformer.measure.timing import Machine
from slabformer.surgery.fuse.report import NormOutcome
from slabformer.surgery.verify import VerifyResult


def row(variant: Variant, mode: Mode, batch_size: int, speed: float, over_baseline: float | None = None) -> Measurement:
    return Measurement(
        variant=variant,
        mode=mode,
        batch_size=batch_size,
        p50_ms=1e3 * batch_size / speed,
        p90_ms=2e3 * batch_size / speed,
        images_per_second=speed,
        memory_mib=None,
        parameters=10,
        macs=10,
        over_baseline=over_baseline,
        over_given=1.0,
        of_ceiling=None,
    )


@pytest.fixture
def report() -> BenchReport:
    machine = Machine(
        device="abacus", threads=1, cores=2, load=0.0, versions={"torch": "9.9"}, command="slab bench x", date="today"
    )
    rows = [row("fused", mode, n, 1234.0, 1.25) for n in (1, 8) for mode in ("eager", "compiled")]
    return BenchReport(model="x", machine=machine, measurements=rows, equality=VerifyResult(0.0, 2e-7, 1.0))


FIGURES = {
    "curves": lambda: curves({"loss": {"SLAB": ([1, 2], [3.0, 2.0])}, "accuracy": {"SLAB": ([1, 2], [0.5, 0.9])}}),
    "gamma": lambda: gamma_over_time([0, 1, 2], [1.0, 0.5, 0.0]),
    "norms": lambda: norm_map(
        [NormOutcome("norm1", "forward", ("fc",)), NormOutcome("norm2", "kept", reason="padding")]
    ),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figures_are_written_as_png_and_as_inline_svg(draw: object, tmp_path: Path) -> None:
    figure = draw()
    assert isinstance(figure, Figure)
    save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.fromstring(to_svg(figure)).tag.endswith("svg")


def test_speed_bars_carry_figures_machine_versions_and_command(report: BenchReport) -> None:
    svg = to_svg(report.picture())
    for text in ("1,234  x1.25", "abacus", "torch 9.9", "slab bench x", "compiled, batch 8", "2.0e-07"):
        assert text in svg


def test_speed_bars_have_a_panel_for_each_mode_and_batch_size(report: BenchReport) -> None:
    figure = report.picture()
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()] == [
        "eager, batch 1",
        "compiled, batch 1",
        "eager, batch 8",
        "compiled, batch 8",
    ]


def test_speed_bars_leave_out_what_was_not_measured(report: BenchReport) -> None:
    fewer = replace(report, measurements=[row for row in report if (row.mode, row.batch_size) != ("compiled", 1)])
    titles = [axes.get_title(loc="left") for axes in fewer.picture().axes if axes.get_visible()]
    assert "compiled, batch 1" not in titles
    assert len(titles) == 3


def test_norm_map_names_and_counts_norms() -> None:
    svg = to_svg(FIGURES["norms"]())
    for text in ("norm1", "norm2", "1 folded into what follows", "1 kept as scale and shift", "where 2 norms went"):
        assert text in svg
    assert "folded into what precedes" not in svg


def test_a_run_keeps_its_colour_in_every_panel() -> None:
    figure = curves({"loss": {"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}, "accuracy": {"b": ([0, 1], [0, 1])}})
    loss, accuracy = figure.axes
    assert loss.lines[1].get_color() == accuracy.lines[0].get_color() != loss.lines[0].get_color()
