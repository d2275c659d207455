"""A table of many models: it resumes, and survives what breaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csv_files import csv_rows
from slabformer.bench.report import BenchReport
from slabformer.bench.zoo import ZooTable
from slabformer.measure.rows import Measurement, Variant
from slabformer.measure.timing import Machine

MACHINE = Machine(
    device="a processor",
    threads=1,
    cores=2,
    load=0.5,
    versions={"torch": str(torch.__version__)},
    command="slab bench",
    date="today",
)


def row(variant: Variant, ms: float) -> Measurement:
    return Measurement(
        variant=variant,
        mode="eager",
        batch_size=8,
        p50_ms=ms,
        p90_ms=ms,
        images_per_second=8e3 / ms,
        memory_mib=None,
        parameters=6_000_000,
        macs=1_000_000_000,
        over_baseline=None if variant == "ceiling" else 20 / ms,
        over_given=12 / ms,
        of_ceiling=8 / ms,
    )


class Meter:
    """Notes which models it is asked for, and breaks at one of them."""

    def __init__(self, breaks: str = "") -> None:
        self.asked: list[str] = []
        self.breaks = breaks

    def __call__(self, model: str) -> BenchReport:
        self.asked.append(model)
        if model == self.breaks:
            raise RuntimeError("two\nlines")
        rows = [row("LayerNorm baseline", 20), row("as given", 12), row("fused", 10), row("ceiling", 8)]
        return BenchReport(model=model, machine=MACHINE, measurements=rows)


def measured(folder: Path, models: list[str], *, breaks: str = "", machine: Machine = MACHINE, settings: str = "a=1"):
    meter, table = Meter(breaks), ZooTable(folder, machine, settings)
    table.measure(models, meter)
    return meter.asked, table


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    assert measured(tmp_path, ["one"])[0] == ["one"]
    asked, table = measured(tmp_path, ["one", "two"])
    assert asked == ["two"]
    assert [row["model"] for row in table.rows] == ["one"] * 4 + ["two"] * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": "a=2"},
        {"machine": replace(MACHINE, threads=2)},
        {"machine": replace(MACHINE, versions={"torch": "0"})},
        {"machine": replace(MACHINE, device="another")},
    ],
    ids=["settings", "threads", "versions", "device"],
)
def test_rows_of_another_kind_are_measured_anew_and_replaced(changes: dict, tmp_path: Path) -> None:
    measured(tmp_path, ["one"])
    asked, table = measured(tmp_path, ["one"], **changes)
    assert asked == ["one"]
    assert len(table.rows) == 4


def test_date_load_and_command_do_not_matter(tmp_path: Path) -> None:
    measured(tmp_path, ["one"])
    assert measured(tmp_path, ["one"], machine=replace(MACHINE, date="later", load=2.0, command="x"))[0] == []


def test_a_table_with_the_old_names_goes_on(tmp_path: Path) -> None:
    table = measured(tmp_path, ["one"], settings="against=baseline a=1")[1]
    table.path.write_text(table.path.read_text().replace("baseline", "twin"))
    asked, table = measured(tmp_path, ["one", "two"], settings="against=baseline a=1")
    assert asked == ["two"]
    assert (
        "| `one` | 8 | eager | 20.0 | 12.0 | 10.0 | 8.0 | 2.00 | 80% | 6.00 M | 1.00 G |" in table.markdown.read_text()
    )


def test_a_model_that_breaks_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    asked, table = measured(tmp_path, ["one", "two", "three"], breaks="two")
    assert asked == ["one", "two", "three"]
    assert [row["error"] for row in table.rows if row["model"] == "two"] == ["RuntimeError: two lines"]
    assert "- `two` broke: RuntimeError: two lines" in table.markdown.read_text()
    asked, table = measured(tmp_path, ["one", "two", "three"])
    assert asked == ["two"]
    assert not any(row["error"] for row in table.rows)


def test_the_files_grow_model_by_model(tmp_path: Path) -> None:
    class Interrupted(Meter):
        def __call__(self, model: str) -> BenchReport:
            if model == "two":
                raise KeyboardInterrupt
            return super().__call__(model)

    with pytest.raises(KeyboardInterrupt):
        ZooTable(tmp_path, MACHINE, "").measure(["one", "two"], Interrupted())
    assert {row["model"] for row in csv_rows(tmp_path / "bench.csv")} == {"one"}


def test_markdown_holds_times_ratios_and_where(tmp_path: Path) -> None:
    text = measured(tmp_path, ["one"])[1].markdown.read_text()
    assert "| `one` | 8 | eager | 20.0 | 12.0 | 10.0 | 8.0 | 2.00 | 80% | 6.00 M | 1.00 G |" in text
    assert "a processor, 1 thread(s); torch=" in text


def test_another_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bench.csv").write_text("model,variant\na,b\n")
    with pytest.raises(ValueError, match="is no benchmark of several models; choose another folder"):
        ZooTable(tmp_path, MACHINE, "")
