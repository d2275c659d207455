"""A language model's run that is killed ends where it would have ended; its checkpoints say when they are damaged."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from csv_files import csv_rows
from language_models import tiny_config
from slabformer.tasks.engine.checkpoint import CheckpointFolders, DamagedCheckpointError
from slabformer.tasks.engine.signals import StoppedError
from slabformer.tasks.language.config import TrainConfig
from slabformer.tasks.language.folders import LanguageRunFolder
from slabformer.tasks.language.train import train
from slabformer.tasks.language.trainer import LanguageTrainer
from slabformer.tasks.language.watch import RecordCallback
from tiny_training import assert_same, die, finish, rank_environments

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["slabformer.tasks.language.train", "accelerate.utils"])


def die_in(name: str) -> None:
    """Die when the Trainer's method ``name`` is called in its last step."""
    original = getattr(LanguageTrainer, name)

    def method(self: LanguageTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == self.args.max_steps:
            die()
        return original(self, *args, **kwargs)

    setattr(LanguageTrainer, name, method)


def _child(config: TrainConfig, setup: Callable[[], None], environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    setup()
    train(config)


def nothing() -> None:
    """A setup that changes nothing."""


def start(config: TrainConfig, setup: Callable[[], None] = nothing, **environment: str) -> BaseProcess:
    """Train in a process of its own, where ``setup`` runs first."""
    process = CONTEXT.Process(target=_child, args=(config, setup, environment), daemon=True)
    process.start()
    return process


def killed(config: TrainConfig, setup: Callable[[], None]) -> None:
    """Train in a process that ``setup`` has killed."""
    assert finish(start(config, setup)) == [-signal.SIGKILL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(tmp_path_factory.mktemp("whole") / "run")).output


def assert_same_run(folder: Path, reference: Path) -> None:
    assert_same(*(load_file(path / "model.safetensors") for path in (folder, reference)))
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, reference)]
    left, right = ({k: v for k, v in row.items() if k not in ("seconds", "resumed", "data")} for row in summaries)
    assert left == right
    assert csv_rows(folder / "metrics.csv") == csv_rows(reference / "metrics.csv")


@pytest.mark.parametrize(
    "moment", ["recalibrate", "_save_rng_state"], ids=["after the last checkpoint", "while saving"]
)
def test_a_run_killed_near_its_end_ends_with_the_same_weights(moment: str, whole: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    killed(config, partial(die_in, moment))
    result = train(config)
    assert result.summary["steps"] == 10
    assert result.summary["resumed"]
    assert_same_run(result.output, whole)
    assert not list(result.output.glob(".*"))


def die_moving_the_model() -> None:
    """Die when the files of the finished model are moved to their places, the weights last."""
    move = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "model.safetensors":
            die()
        move(source, target)

    os.replace = replace


def test_a_run_killed_while_it_writes_the_model_leaves_nothing_half_written(whole: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    killed(config, die_moving_the_model)
    assert list(config_folder(config).glob(".slabformer-*.part"))
    assert_same_run(train(config).output, whole)
    assert not list(config_folder(config).glob(".*"))


def config_folder(config: TrainConfig) -> Path:
    return Path(config.output)


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> TrainConfig:
    """A run whose result is missing, with the checkpoints of steps 5 and 10."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.copy(whole.parent / "text.txt", tmp_path)
    (folder / "summary.json").unlink()
    return tiny_config(folder)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink], ids=["bit", "truncated", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named(
    name: str, damage: Callable[[Path], None], stopped: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    folder = config_folder(stopped)
    damage(folder / "checkpoint-10" / name)
    with caplog.at_level(logging.WARNING):
        assert CheckpointFolders(folder).latest() == folder / "checkpoint-5"
    assert f"checkpoint-10/{name} is missing, truncated or altered" in caplog.text
    assert "using the one before" in caplog.text


def test_the_checkpoint_before_a_damaged_one_goes_on_the_same(stopped: TrainConfig, whole: Path) -> None:
    flip_a_bit(config_folder(stopped) / "checkpoint-10" / "optimizer.pt")
    assert_same_run(train(stopped).output, whole)
    assert CheckpointFolders(config_folder(stopped)).latest() == config_folder(stopped) / "checkpoint-10"


def test_nothing_but_damaged_checkpoints_is_not_a_fresh_start(stopped: TrainConfig) -> None:
    for step in (5, 10):
        flip_a_bit(config_folder(stopped) / f"checkpoint-{step}" / "checksums.json")
    with pytest.raises(DamagedCheckpointError, match=r"every checkpoint in .* damaged; start again with --overwrite"):
        train(stopped)


def test_a_checkpoint_without_checksums_is_taken_with_a_warning(
    stopped: TrainConfig, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (config_folder(stopped) / "checkpoint-10" / "checksums.json").unlink()
    assert_same_run(train(stopped).output, whole)
    assert "checkpoint-10 has no checksums.json and cannot be checked" in caplog.text


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = tiny_config(tmp_path / "run")
    save = LanguageTrainer._save_optimizer_and_scheduler

    def fill(self: LanguageTrainer, folder: str) -> None:
        if self.state.global_step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(self, folder)

    monkeypatch.setattr(LanguageTrainer, "_save_optimizer_and_scheduler", fill)
    try:
        with pytest.raises(OSError, match=str(tmp_path / "run" / "checkpoint-10")):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert CheckpointFolders(config_folder(config)).paths() == [config_folder(config) / "checkpoint-5"]
    assert not list(config_folder(config).glob(".*"))


@pytest.mark.slow
def test_two_ranks_write_one_checkpoint_and_go_on_from_it(tmp_path: Path) -> None:
    whole, config = (tiny_config(tmp_path / name, steps=6, save_every=3) for name in ("whole", "run"))
    for each, setup, codes in ((whole, nothing, {0}), (config, partial(die_in, "recalibrate"), {-signal.SIGKILL})):
        ranks = [start(each, setup, **environment) for environment in rank_environments()]
        assert set(finish(*ranks)) == codes
    for step in (3, 6):
        checkpoint = config_folder(config) / f"checkpoint-{step}"
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(
            json.loads((checkpoint / "checksums.json").read_text())["sha256"]
        )
    assert finish(*(start(config, **environment) for environment in rank_environments())) == [0, 0]
    assert_same_run(config_folder(config), config_folder(whole))


def test_a_folder_of_the_users_that_looks_like_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    mine = config_folder(config) / "checkpoint-3"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"checkpoint-3 is in the way, and no run wrote it"):
            train(replace(config, overwrite=overwrite))
    assert (mine / "notes.txt").read_text() == "mine"


def test_a_signal_after_the_last_step_stops_the_run_which_goes_on_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTrainer, "recalibrate", lambda self, batches: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError, match="stopped by SIGTERM after step 10") as caught:
            train(config)
    assert caught.value.exit_code == 143
    assert_same_run(train(config).output, whole)


def unable_to(write: str) -> None:
    """Let the first rank's ``write`` fail as on a file system that is mounted read-only."""
    owner = {"claim": LanguageRunFolder, "record": RecordCallback, "save": CheckpointFolders}[write]
    name = {"claim": "claimed", "record": "on_log", "save": "keep_from"}[write]
    original = getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if write == "record":
            args[0].steps.append = full
            return original(*args, **kwargs)
        full()
        return original(*args, **kwargs)

    setattr(owner, name, fails)


def full(*_: object) -> None:
    """What a file system says that takes nothing more."""
    if os.environ["RANK"] == "0":
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "run")


def tell(write: str, config: TrainConfig, environment: dict[str, str]) -> None:
    """Train where the first rank cannot ``write``, and note how it ended."""
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    unable_to(write)
    try:
        train(config)
    except Exception as error:
        Path(f"{config.output}-{environment['RANK']}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("write", ["claim", "record", "save"])
def test_a_rank_that_cannot_write_ends_all_with_its_reason(write: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=6, save_every=3, log_every=2)
    ranks = [
        CONTEXT.Process(target=tell, args=(write, config, environment), daemon=True)
        for environment in rank_environments()
    ]
    for rank in ranks:
        rank.start()
    assert finish(*ranks) == [0, 0]
    told = [Path(f"{config.output}-{rank}").read_text() for rank in range(2)]
    assert told[0].startswith("OSError: [Errno 30] Read-only file system")
    assert told[1].startswith("OSError: [Errno 30] Read-only file system")
    assert told[1].endswith("(rank 0)")


def test_events_of_tensorboard_belong_to_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tiny_config(tmp_path / "run", steps=3, tensorboard=True)
    train(config)
    (events,) = config_folder(config).glob("events.out.tfevents*")
    assert events.name in json.loads((config_folder(config) / "manifest.json").read_text())["files"]
    assert not [path for path in config_folder(config).iterdir() if path.is_dir() and path.name == "runs"]
    train(replace(config, overwrite=True, seed=1))
    assert not events.exists()
