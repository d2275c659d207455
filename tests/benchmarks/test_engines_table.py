"""The table of engines: the fastest of ours over the fastest of the baseline's, and README's is that of the results."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare import read
from engines import RESULTS
from engines_table import BASELINE, BEGIN, END, SLAB, best, draw, into_readme, markdown, readme_table

README = Path(__file__).parents[2] / "README.md"


def row(form: str, engine: str, ms: float, **others: str) -> dict[str, str]:
    common = {"model": "slab_deit_tiny", "batch_size": "8", "threads": "1", "dtype": "float32"}
    common |= {"device": "a processor", "versions": "torch=2", "best_baseline": "onnxruntime"}
    figures = {"cpu_ms_per_image": str(ms), "ms_per_image": str(2 * ms), "over_best_baseline": "1.0"}
    return common | figures | {"form": form, "engine": engine} | others


ROWS = [
    row(SLAB, "openvino", 5.0),
    row(SLAB, "aoti", 4.0),
    row(BASELINE, "openvino", 9.0),
    row(BASELINE, "onnxruntime", 6.0),
    row(SLAB, "openvino", 2.0, dtype="int8"),
    row(SLAB, "openvino", 1.0, threads="2"),
]


def test_each_model_is_held_against_the_engine_that_is_best_for_its_baseline() -> None:
    assert best(ROWS[:5], BASELINE) is ROWS[3]
    assert readme_table(ROWS).splitlines() == [
        "| | DeiT-T |",
        "|---|---:|",
        "| float32, batch 8 | 1.50 (aoti / onnxruntime) |",
        "| int8, batch 8 | - |",
    ]


def test_with_several_threads_the_clock_counts() -> None:
    slow_by_the_clock = row(SLAB, "aoti", 0.5, threads="2", ms_per_image="9.0")
    assert best([ROWS[5], slow_by_the_clock], SLAB, threads=2) is ROWS[5]


def test_the_table_stands_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    into_readme(ROWS, page)
    assert page.read_text() == f"before\n{BEGIN}\n{readme_table(ROWS)}\n{END}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match=r"README\.md has no marks"):
        into_readme(ROWS, page)
    assert page.read_text() == "no marks\n"


def test_every_program_has_a_line_and_what_was_not_measured_too(tmp_path: Path) -> None:
    text = markdown(ROWS, ["executorch in float32: not installed"])
    assert text.count("| slab_deit_tiny |") == len(ROWS)
    assert "- not measured: executorch in float32: not installed" in text
    assert draw(ROWS, tmp_path).stat().st_size > 5000


def test_readme_says_what_the_results_say() -> None:
    rows = read(RESULTS / "engines.csv")
    assert rows, "run `python benchmarks/engines.py`"
    assert f"{BEGIN}\n{readme_table(rows)}\n{END}" in README.read_text(), "run `python benchmarks/engines.py`"
