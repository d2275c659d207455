"""Two processes train as one does with the same total batch."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from slabformer.tasks.classification.config import AugmentConfig, ModelConfig, TrainConfig
from slabformer.tasks.classification.result import read_history
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.config import OptimizerConfig
from slabformer.tasks.engine.observers import Observer
from tiny_training import TINY_MODEL, AtStep, finish, start, start_ranks, tiny_config, weights

#: twelve steps of float32 whose sums run in another order; measured 1e-5
SAME_TRAINING = 1e-4
#: biases that have hardly left 0 are held against weights as they are drawn
WEIGHT_SCALE = 0.02


def undisturbed(output: Path, batch_size: int, **changes: object) -> TrainConfig:
    """Without mixup and drop path, which draw by rank; SGD, since Adam turns rounding of tiny gradients into steps."""
    return tiny_config(
        output,
        model=ModelConfig(name="slab_deit_micro", args=TINY_MODEL),
        augment=AugmentConfig(scale=(0.5, 1.0), mixup=0.0, cutmix=0.0),
        optimizer=OptimizerConfig(name="sgd", lr=0.05, lr_base_batch=None),
        batch_size=batch_size,
        **changes,
    )


def kill_one_rank(step: int) -> list[Observer]:
    return [AtStep(step, lambda: os.kill(os.getpid(), signal.SIGTERM))]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_result_of_one(accumulate: int, tmp_path: Path) -> None:
    one = undisturbed(tmp_path / "one", batch_size=8, accumulate=accumulate)
    two = undisturbed(tmp_path / "two", batch_size=4, accumulate=accumulate)
    assert finish(start(one), *start_ranks(two)) == [0, 0, 0]
    for name in ("model", "ema"):
        expected, got = weights(tmp_path / "one", name), weights(tmp_path / "two", name)
        statistics = [key for key in expected if "running" in key]
        assert statistics
        for key in expected:
            floor = WEIGHT_SCALE * expected[key].numel() ** 0.5
            # norms of whole tensors: a ReLU at its kink turns rounding into a step of one weight
            difference = (got[key] - expected[key]).float().norm()
            assert difference <= SAME_TRAINING * expected[key].float().norm().clamp(min=floor), key
    for left, right in zip(read_history(tmp_path / "one"), read_history(tmp_path / "two"), strict=True):
        assert left["top1"] == right["top1"]
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=SAME_TRAINING)


@pytest.mark.slow
def test_sigterm_on_one_rank_saves_and_stops_both_and_both_go_on(tmp_path: Path) -> None:
    whole, cut = undisturbed(tmp_path / "whole", 4, save_every=0), undisturbed(tmp_path / "cut", 4, save_every=0)
    assert finish(*start_ranks(whole)) == [0, 0]
    assert finish(*start_ranks(cut, partial(kill_one_rank, 5))) == [143, 143]
    found = CheckpointStore(tmp_path / "cut").load_latest()
    assert found is not None
    assert found[1]["position"]["step"] == 5
    assert len(found[1]["random"]) == 2
    assert finish(*start_ranks(cut)) == [0, 0]
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.slow
def test_another_number_of_processes_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from slabformer.tasks.classification.train import train

    config = undisturbed(tmp_path / "run", 4, save_every=0)
    assert finish(*start_ranks(config, partial(kill_one_rank, 5))) == [143, 143]
    with pytest.raises(ValueError, match="processes was 2, now 1"):
        train(config)
