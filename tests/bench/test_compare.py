"""`compare`: equality first, then speeds with all that must stand beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import slabformer as sf
from csv_files import csv_rows
from slabformer.bench.compare import compare
from slabformer.bench.report import BenchReport
from small_models import images, trained_looking

VARIANTS = ["as given", "fused", "LayerNorm baseline", "ceiling"]


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return compare(
        trained_looking(),
        images(),
        baseline=trained_looking("deit_micro"),
        batch_sizes=(1, 3),
        compiled=False,
        seconds=0.1,
        name="micro",
    )


def test_every_variant_is_measured_at_every_batch_size(report: BenchReport) -> None:
    assert [(row.batch_size, row.variant) for row in report] == [(n, name) for n in (1, 3) for name in VARIANTS]


def test_figures_belong_together(report: BenchReport) -> None:
    for row in report:
        assert row.images_per_second == pytest.approx(row.batch_size * 1e3 / row.p50_ms)
        assert 0 < row.p50_ms <= row.p90_ms
    given, fused = (report.find(variant, "eager", 3) for variant in ("as given", "fused"))
    assert given is not None
    assert fused is not None
    assert (given.over_given, fused.macs) == (1.0, given.macs)
    assert fused.parameters < given.parameters
    baseline, ceiling = (report.find(variant, "eager", 3) for variant in ("LayerNorm baseline", "ceiling"))
    assert baseline is not None
    assert ceiling is not None
    assert (baseline.over_baseline, ceiling.of_ceiling) == (1.0, 1.0)
    assert ceiling.macs < fused.macs


def test_macs_are_per_image(report: BenchReport) -> None:
    assert len({row.macs for row in report if row.variant == "fused"}) == 1
    assert all(row.of_floor is None for row in report), "nobody asked for the roofline"


def test_equality_stands_beside_the_speeds(report: BenchReport) -> None:
    assert report.equality is not None
    assert report.equality.max_rel <= 1e-5
    assert "9 of 9 norms folded" in report.caption()
    assert f"torch {torch.__version__}" in report.caption()


def test_no_speed_is_told_of_a_model_that_differs() -> None:
    model = trained_looking()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.head.bias += 1.0
    with pytest.raises(sf.VerificationError):
        compare(model, images(), fused=wrong, compiled=False, seconds=0.1)


def test_a_baseline_with_other_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="same number of classes"):
        compare(trained_looking(), images(), baseline=nn.Sequential(nn.Flatten(), nn.Linear(768, 7)), compiled=False)


@pytest.mark.parametrize("batch_sizes", [(0,), (2, -1), ()], ids=["zero", "negative", "none"])
def test_batch_sizes_must_be_positive(batch_sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        compare(trained_looking(), images(), batch_sizes=batch_sizes)


def test_train_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        compare(trained_looking().train(), images())


def test_a_model_with_nothing_to_fuse_is_still_measured() -> None:
    report = compare(trained_looking("deit_micro"), images(), batch_sizes=(1,), compiled=False, seconds=0.1)
    assert [row.variant for row in report] == ["as given", "ceiling"]
    assert any("nothing to fuse" in note for note in report.notes)


def test_files_hold_the_figures_and_where_they_were_taken(report: BenchReport, tmp_path: Path) -> None:
    table, data, plot = report.write(tmp_path / "new" / "folder")
    rows = csv_rows(table)
    assert [row["variant"] for row in rows] == 2 * VARIANTS
    assert all(row["device"] and row["versions"] and row["command"] for row in rows)
    assert json.loads(data.read_text())["measurements"][0]["p50_ms"] == float(rows[0]["p50_ms"])
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compiled_forms_are_held_against_eager_and_against_each_other() -> None:
    report = compare(trained_looking(), images(), batch_sizes=(1, 2), compiled=(2,), seconds=0.3, threads=1)
    assert [(row.batch_size, row.mode, row.variant) for row in report] == [
        (batch_size, mode, variant)
        for batch_size, mode in ((1, "eager"), (2, "eager"), (2, "compiled"))
        for variant in ("as given", "fused", "ceiling")
    ]
    given = report.find("as given", "compiled", 2)
    assert given is not None
    assert given.over_given == 1.0
    assert report.machine.threads == 1


def test_without_a_compiler_eager_is_measured_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> object:
        def run(*inputs: object) -> object:
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    report = compare(trained_looking(), images(), batch_sizes=(1, 2), seconds=0.1)
    assert {row.mode for row in report} == {"eager"}
    assert sum("torch.compile failed" in note for note in report.notes) == 1
