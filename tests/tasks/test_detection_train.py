"""Training a detector: what it leaves, that it goes on as if never stopped, and what it refuses."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from coco_files import CATEGORIES
from csv_files import CLOCK, csv_rows
from slabformer.models.detection.mask_rcnn import Detector
from slabformer.nn.controls import repbn_modules
from slabformer.tasks.detection.baseline import train_baseline
from slabformer.tasks.detection.config import ModelConfig
from slabformer.tasks.detection.result import MASK_LOSSES, TrainResult
from slabformer.tasks.detection.saved import load_detector
from slabformer.tasks.detection.train import train
from slabformer.tasks.engine.checkpoint import CheckpointStore, read_checkpoint
from slabformer.tasks.engine.nonfinite import NonFiniteError
from slabformer.tasks.engine.observers import Observer, StepReport
from slabformer.tasks.engine.signals import StoppedError
from tiny_detection import NO_STEPS, TINY_BACKBONE, tiny_config
from tiny_training import AtStep, assert_same, weights

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(tiny_config(tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_leaves_its_files_and_the_classes_with_the_weights(uninterrupted: TrainResult) -> None:
    folder = uninterrupted.output
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.csv", "steps.csv", "result.json", "model.safetensors", "best.safetensors"),
        *("checkpoint-4.pt", "checkpoint-6.pt", "manifest.json"),
    }
    detector, info = load_detector(folder / "model.safetensors")
    assert info.class_names == NAMES
    assert info.category_ids == sorted(row["id"] for row in CATEGORIES)
    assert (info.size, info.max_size) == (48, 64)
    assert not detector.training
    assert uninterrupted.metrics.keys() >= {"box_ap", "box_ap50", "mask_ap", "box_ar100"}


def test_every_part_of_the_loss_is_written_and_they_add_up(uninterrupted: TrainResult) -> None:
    steps = csv_rows(uninterrupted.output / "steps.csv")
    assert len(steps) == 6
    for row in steps:
        assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in MASK_LOSSES), rel=1e-5)
        assert all(row[name] for name in MASK_LOSSES)


def test_gamma_fades_by_share_of_the_run_and_the_blend_is_evaluated_beside(uninterrupted: TrainResult) -> None:
    history = uninterrupted.history
    assert [row["gamma"] for row in history] == [pytest.approx(2 / 3), 0.0, 0.0]
    assert ["blend_box_ap" in row for row in history] == [True, False, False]
    assert all("box_ap" in row and "mask_ap" in row for row in history)


def test_statistics_alone_are_recalibrated_at_the_end(uninterrupted: TrainResult) -> None:
    last = weights(uninterrupted.output)
    before = read_checkpoint(uninterrupted.output / "checkpoint-6.pt")["model"]
    differ = {name for name in last if not torch.equal(last[name], before[name])}
    statistics = {name for name in last if name.endswith(("running_mean", "running_var"))}
    assert differ == statistics


@pytest.mark.parametrize("step", [3, 4], ids=["in the middle of an epoch", "between two"])
def test_stopped_and_resumed_equals_uninterrupted(step: int, uninterrupted: TrainResult, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    with pytest.raises(StoppedError, match=f"after step {step}"):
        train(config, observers=[AtStep(step, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    found = CheckpointStore(tmp_path / "run").load_latest()
    assert found is not None
    assert found[1]["position"]["step"] == step
    assert found[1]["fingerprint"]["class_names"] == NAMES
    again = train(config)
    assert_same(weights(tmp_path / "run"), weights(uninterrupted.output))
    assert again.metrics == uninterrupted.metrics
    for name in ("metrics.csv", "steps.csv"):
        assert csv_rows(tmp_path / "run" / name, *CLOCK) == csv_rows(uninterrupted.output / name, *CLOCK)


def test_a_finished_run_is_not_trained_again(uninterrupted: TrainResult) -> None:
    again = train(tiny_config(uninterrupted.output))
    assert again.already_finished
    assert again.metrics == uninterrupted.metrics
    assert isinstance(again.detector, Detector)


class Poison(Observer):
    """Makes a weight NaN after the first step."""

    def __init__(self, detector: list[Detector]) -> None:
        self.detector = detector

    def on_step(self, report: StepReport) -> None:
        with torch.no_grad():
            self.detector[0].roi_heads.box_predictor.cls_score.weight.fill_(float("nan"))


def test_a_non_finite_loss_names_the_files_of_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slabformer.tasks.detection import train as module

    built: list[Detector] = []
    build = module.build_model
    monkeypatch.setattr(module, "build_model", lambda *args: built.append(build(*args)) or built[0])
    with pytest.raises(NonFiniteError, match=r"step 2 .*first in the output of .*cls_score.*, on \d\.png, \d\.png"):
        train(tiny_config(tmp_path / "run", accumulate=1), observers=[Poison(built)])


@pytest.mark.parametrize("where", ["data", "detector"])
def test_boxes_alone_train_without_masks(where: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", epochs=1, lr_schedule=NO_STEPS)
    getattr(config, where).masks = False
    result = train(config)
    assert "box_ap" in result.metrics
    assert not any(name.startswith("mask") for name in result.metrics)
    with safe_open(result.output / "model.safetensors", "pt") as file:
        assert not any("mask" in name for name in file.keys())  # noqa: SIM118


def test_statistics_that_weights_brought_stand_still_and_nothing_fades_again(
    uninterrupted: TrainResult, tmp_path: Path
) -> None:
    start = str(uninterrupted.output / "model.safetensors")
    model = ModelConfig(args=TINY_BACKBONE, weights=start)
    result = train(tiny_config(tmp_path / "run", epochs=1, lr_schedule=NO_STEPS, model=model))
    before, after = weights(uninterrupted.output), weights(result.output)
    assert all(torch.equal(before[name], after[name]) for name in before if "running_" in name)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("rep.weight"))
    assert [row["gamma"] for row in result.history] == [0.0]


def test_the_baseline_has_layernorm_and_lies_beside(tmp_path: Path) -> None:
    result = train_baseline(tiny_config(tmp_path / "run", epochs=1, lr_schedule=NO_STEPS))
    assert result.output == tmp_path / "run" / "baseline"
    assert not repbn_modules(result.detector)
    norms = [module for module in result.detector.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 18


def test_a_long_run_on_a_cpu_that_nobody_asked_for_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = tiny_config(tmp_path / "run", device="auto", epochs=100_000)
    with pytest.raises(ValueError, match=r"no accelerator here: 400,000 batches would take about .* --device cpu"):
        train(config)
    assert not (tmp_path / "run").exists()
