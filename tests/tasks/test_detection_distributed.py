"""A detector on two processes: statistics and weights stay together, images are shared out, figures are of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slabformer.tasks.detection.evaluate import evaluate, flat
from slabformer.tasks.detection.loader import create_loader
from slabformer.tasks.detection.saved import load_detector
from slabformer.tasks.engine.checkpoint import CheckpointStore
from tiny_detection import NO_STEPS, tiny_config
from tiny_training import finish, start_ranks


@pytest.mark.slow
def test_two_processes_train_and_count_what_one_counts(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", epochs=2, batch_size=1, lr_schedule=NO_STEPS)
    assert finish(*start_ranks(config)) == [0, 0]
    found = CheckpointStore(tmp_path / "run").load_latest()
    assert found is not None
    assert len(found[1]["random"]) == 2
    detector, _ = load_detector(tmp_path / "run" / "model.safetensors")
    loader = create_loader(config.data, config.augment, "validation", batch_size=1, seed=0)
    alone = flat(evaluate(detector, loader))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == pytest.approx(alone)
