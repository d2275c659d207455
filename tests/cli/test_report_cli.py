from __future__ import annotations

from pathlib import Path

import pytest

from bench_files import bench_file
from slabformer.cli.main import main


@pytest.fixture
def speeds(tmp_path: Path) -> str:
    bench_file(tmp_path / "speeds", "slab_deit_tiny")
    bench_file(tmp_path / "speeds", "slab_cswin_tiny")
    return str(tmp_path / "speeds")


def test_the_table_says_where_an_accuracy_comes_from_and_the_figure_is_written(speeds, tmp_path, capsys, caplog):
    output = tmp_path / "report.svg"
    assert main(["report", speeds, "--accuracy", "slab_deit_tiny=74.1", "--output", str(output)]) == 0
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    table = {cells[1]: cells[2:-1] for cells in lines if len(cells) == 7}
    assert table["slab_deit_tiny"] == ["24.0", "1.20", "74.1", "measured"]
    assert table["slab_cswin_tiny"] == ["24.0", "1.20", "82.8", "published"]
    assert table["cswin_tiny"] == ["20.0", "-", "-", "unknown"]
    assert "no accuracy is known of cswin_tiny: not drawn" in caplog.text
    assert "slab_cswin_tiny" in output.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accuracy", "slab_deit_tiny"], "--accuracy takes NAME=PERCENT with a percentage from 0 to 100"),
        (["--accuracy", "slab_deit_tiny=740"], "got 'slab_deit_tiny=740'"),
        (["--batch-size", "3"], "not every model was measured fused, eager or compiled, batch 3, in common"),
        (["--output", "report.doc"], "--output must be a .png, .svg or .pdf file, got 'report.doc'"),
    ],
    ids=["form", "range", "size", "format"],
)
def test_a_mistake_costs_one_line(options, message, speeds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", speeds, *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.glob("report*")) == []


def test_models_without_any_accuracy_are_refused(tmp_path, capsys):
    path = bench_file(tmp_path, "slab_deit_micro", baseline=False)
    assert main(["report", str(path), "--output", str(tmp_path / "report.png")]) == 2
    assert "no accuracy is known of slab_deit_micro; give measured ones: --accuracy" in capsys.readouterr().err
