"""Every form of a detector is timed, after it was found to detect the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slabformer as sf
from csv_files import csv_rows
from detectors import pictures, small_detector, without_folding
from slabformer.bench import detector as detector_latency
from slabformer.bench.detector import as_if_trained_, measure_latency
from slabformer.bench.detector_report import LatencyReport
from slabformer.measure.timing import time_interleaved
from slabformer.nn import PRepBN
from tolerances import EXACT, assert_close

SIZE = (64, 80)


@pytest.fixture(scope="module")
def detectors():
    """A detector and its baseline with LayerNorm."""
    (image,) = pictures(SIZE)
    tiny = {"depths": (1, 1, 1, 1)}
    baseline, detector = (small_detector(backbone=tiny | norms) for norms in ({"norm": "layernorm"}, {}))
    return {"LayerNorm": as_if_trained_(baseline, image), "PRepBN": as_if_trained_(detector, image)}


@pytest.fixture(autouse=True)
def _fused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_latency, "fuse_detector", without_folding)


@pytest.fixture(scope="module")
def measured(detectors) -> tuple[LatencyReport, dict[tuple[str, str, str], object]]:
    """Both, eager, measured as briefly as can be, and what each form that was timed returns."""
    outputs = {}

    def timed(calls, **options):
        outputs.update({key: call() for key, call in calls.items()})
        return time_interleaved(calls, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector_latency, "fuse_detector", without_folding)
        patch.setattr(detector_latency, "time_interleaved", timed)
        report = measure_latency(
            detectors, *pictures(SIZE), fuse="PRepBN", threads=1, compiled=False, seconds=0.0, name="micro"
        )
    return report, outputs


@pytest.fixture(scope="module")
def report(measured) -> LatencyReport:
    return measured[0]


def test_backbone_and_detector_are_timed_unfused_and_fused(report):
    forms = {(row.variant, row.part, row.mode) for row in report.rows}
    assert forms == {
        (variant, part, "eager")
        for variant in ("LayerNorm", "PRepBN", "PRepBN fused")
        for part in ("backbone", "detector")
    }
    for row in report.rows:
        assert 0 < row.p50_ms <= row.p90_ms
        assert row.num_detections == 10
    for part in ("backbone", "detector"):
        assert report.find("LayerNorm", part, "eager").speed_up == 1
    backbone, detector = (report.find("PRepBN", part, "eager") for part in ("backbone", "detector"))
    assert backbone.parameters < detector.parameters
    assert report.find("PRepBN fused", "backbone", "eager").parameters < backbone.parameters


def test_each_form_is_timed_on_what_its_part_computes(measured, detectors):
    _, outputs = measured
    (image,) = pictures(SIZE)
    for name, detector in detectors.items():
        maps, (found,) = outputs[name, "backbone", "eager"], outputs[name, "detector", "eager"]
        with torch.no_grad():
            expected = detector.backbone(detector.transform([image])[0].tensors)
        assert maps.keys() == expected.keys()
        for level, features in maps.items():
            assert_close(features, expected[level], EXACT)
        assert len(found["boxes"]) == 10


def test_figures_are_written_with_where_they_were_taken(report, tmp_path):
    paths = report.write(tmp_path)
    assert [path.name for path in paths] == ["latency.csv", "latency.md", "latency.json"]
    rows = csv_rows(paths[0])
    assert len(rows) == len(report.rows) == 6
    assert (rows[0]["height"], rows[0]["width"], rows[0]["threads"]) == ("64", "80", "1")
    page = paths[1].read_text()
    assert "latency of micro at 64x80" in page
    assert f"torch {torch.__version__}" in page
    assert report.table().row_count == 6


def test_a_fused_form_that_detects_something_else_is_not_timed(detectors, monkeypatch):
    monkeypatch.setattr(detector_latency, "fuse_detector", lambda detector: (detectors["LayerNorm"], ()))
    with pytest.raises(sf.VerificationError):
        measure_latency(detectors, *pictures(SIZE), fuse="PRepBN", compiled=False, seconds=0.0)


@torch.no_grad()
def test_a_fresh_detector_is_given_scores_that_differ_and_norms_that_matter():
    (image,) = pictures(SIZE)
    detector = small_detector()
    assert not len(detector.eval()([image])[0]["labels"]) or detector([image])[0]["scores"].std() < 0.1
    (found,) = as_if_trained_(detector, image)([image])
    assert len(found["labels"]) > 5
    assert found["scores"].max() > 0.5
    norms = [module for module in detector.modules() if isinstance(module, PRepBN)]
    assert {norm.phase for norm in norms} == {"done"}
    assert all(norm.rep.running_var.std() > 0 for norm in norms)
    assert not detector.training


class Doubled(nn.Module):
    def __init__(self, model: nn.Module, device: object) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: 2 * level for name, level in self.model(x).items()}


def test_a_compiled_backbone_that_computes_something_else_is_not_timed(detectors, monkeypatch):
    monkeypatch.setattr(detector_latency, "Compiled", Doubled)
    with pytest.raises(sf.VerificationError, match="outputs differ"):
        measure_latency(detectors, *pictures(SIZE), fuse="PRepBN", seconds=0.0)
