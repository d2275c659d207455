"""Training that is killed and goes on ends where it would have ended anyway, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from csv_files import CLOCK, csv_rows
from slabformer.tasks.engine.checkpoint import CheckpointStore, read_checkpoint
from slabformer.tasks.engine.observers import Observer
from tiny_training import AtStep, assert_same, die, die_in_checkpoint, finish, start, tiny_config, weights

KILLED, TERMINATED, INTERRUPTED = -signal.SIGKILL, 143, 130


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(tiny_config(folder))) == [0]
    return folder


def assert_same_run(folder: Path, reference: Path) -> None:
    for name in ("model", "ema", "best"):
        assert_same(weights(folder, name), weights(reference, name))
    assert (folder / "result.json").read_text() == (reference / "result.json").read_text()
    for name in ("metrics.csv", "steps.csv"):
        assert csv_rows(folder / name, *CLOCK) == csv_rows(reference / name, *CLOCK)


def observe_death(step: int) -> list[Observer]:
    return [AtStep(step, die)]


def observe_late_death(step: int, seconds: float) -> list[Observer]:
    return [AtStep(step, threading.Timer(seconds, die).start)]


def observe_signal(step: int, signum: int) -> list[Observer]:
    return [AtStep(step, lambda: os.kill(os.getpid(), signum))]


def test_a_run_uses_everything_that_could_differ(uninterrupted: Path) -> None:
    model, ema = weights(uninterrupted), weights(uninterrupted, "ema")
    assert any(not torch.equal(model[name], ema[name]) for name in model)
    assert len(csv_rows(uninterrupted / "steps.csv")) == 6
    assert [row["gamma"] for row in csv_rows(uninterrupted / "metrics.csv")][-1] == "0"


def test_the_same_run_twice_is_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    assert finish(start(tiny_config(tmp_path))) == [0]
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("steps", [(4,), (2, 5, 11)], ids=str)
def test_killed_after_a_step_ends_the_same(steps: tuple[int, ...], uninterrupted: Path, tmp_path: Path) -> None:
    for step in steps:
        assert finish(start(tiny_config(tmp_path), partial(observe_death, step))) == [KILLED]
    assert finish(start(tiny_config(tmp_path))) == [0]
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("moment", ["half written", "before rename", "after rename"])
@pytest.mark.parametrize("number", [1, 4])
def test_killed_while_writing_a_checkpoint_ends_the_same(
    number: int, moment: str, uninterrupted: Path, tmp_path: Path
) -> None:
    assert finish(start(tiny_config(tmp_path), partial(die_in_checkpoint, number, moment))) == [KILLED]
    assert finish(start(tiny_config(tmp_path))) == [0]
    assert_same_run(tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.slow
def test_killed_at_random_moments_ends_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    codes = []
    for step in (1, 3, 4, 6, 8, 9, 10):
        codes += finish(start(tiny_config(tmp_path), partial(observe_late_death, step, draw.uniform(0, 0.1))))
    assert KILLED in codes
    assert finish(start(tiny_config(tmp_path))) == [0]
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_and_exits_with_its_code(signum: int, code: int, uninterrupted: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, save_every=0)
    assert finish(start(config, partial(observe_signal, 5, signum))) == [code]
    found = CheckpointStore(tmp_path).load_latest()
    assert found is not None
    assert found[1]["position"] == {"epoch": 1, "batch": 4, "step": 5}
    assert finish(start(config)) == [0]
    assert_same_run(tmp_path, uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on_the_same(
    uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert finish(start(tiny_config(tmp_path), partial(observe_death, 7))) == [KILLED]
    newest, before = CheckpointStore(tmp_path).paths()
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    found = CheckpointStore(tmp_path).load_latest()
    assert found is not None
    assert found[0] == before
    assert str(newest) in caplog.text
    assert finish(start(tiny_config(tmp_path))) == [0]
    assert_same_run(tmp_path, uninterrupted)


def test_a_checkpoint_holds_the_whole_state(uninterrupted: Path) -> None:
    state = read_checkpoint(CheckpointStore(uninterrupted).paths()[0])
    assert state.keys() == {
        *("model", "ema", "optimizer", "lr_schedule", "gamma_schedule", "scaler"),
        *("position", "meter", "random", "best", "fingerprint"),
    }
    assert state["gamma_schedule"]["step"] == state["position"]["step"] == 12
    assert state["ema"]["blocks.0.norm1.gamma"] == 0
