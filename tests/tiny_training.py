"""A training run of a second, and child processes that can be killed in the middle of one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_folders import fill_splits
from slabformer.tasks.classification.config import (
    AugmentConfig,
    DataConfig,
    EmaConfig,
    GammaConfig,
    ModelConfig,
    TrainConfig,
)
from slabformer.tasks.engine.config import LrConfig, OptimizerConfig, RunConfig
from slabformer.tasks.engine.observers import Observer, StepReport
from slabformer.tasks.engine.signals import StoppedError

#: a model whose training step takes milliseconds
TINY_MODEL = {"embed_dim": 16, "depth": 2, "num_heads": 2}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["slabformer.tasks.classification.train", "timm.data", "timm.optim", "timm.loss", "accelerate.utils"]
)


def tiny_config(output: Path, **changes: Any) -> TrainConfig:
    """Everything that draws random numbers or holds state is on: mixup, drop path, EMA, accumulation, fading."""
    images = output.parent / "images"
    if not images.exists():
        fill_splits(images, train=14, validation=4)  # 5 batches an epoch: windows of 2, 2 and 1
    settings: dict[str, Any] = {
        "model": ModelConfig(name="slab_deit_micro", args={**TINY_MODEL, "drop_path_rate": 0.2}),
        "data": DataConfig(path=str(images), image_size=16, crop_pct=1.0),
        "augment": AugmentConfig(scale=(0.5, 1.0)),
        "optimizer": OptimizerConfig(lr=2e-3, lr_base_batch=None),
        "lr_schedule": LrConfig(warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-5),
        "gamma": GammaConfig(warmup=0.1, fade=0.5),
        "ema": EmaConfig(decay=0.9),
        "epochs": 4,
        "batch_size": 8,
        "accumulate": 2,
        "num_workers": 0,
        "output": str(output),
        "device": "cpu",
        "log_every": 2,
        "save_every": 2,
        "tensorboard": False,
    }
    return TrainConfig(**{**settings, **changes})


class AtStep(Observer):
    """Does something after an optimizer step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            self.action()


def die() -> None:
    """What a power cut does to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def start(config: RunConfig, setup: Callable[[], list[Observer]] | None = None, **environment: str) -> BaseProcess:
    """Train in a process of its own; ``setup`` runs there first and gives observers."""
    process = CONTEXT.Process(target=_child, args=(config, setup, environment), daemon=True)
    process.start()
    return process


def start_ranks(config: RunConfig, setup: Callable[[], list[Observer]] | None = None) -> list[BaseProcess]:
    """Train in two processes that share gradients through gloo, as torchrun would start them."""
    return [start(config, setup, **environment) for environment in rank_environments()]


def rank_environments() -> list[dict[str, str]]:
    """What torchrun says to each of two processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(2)]


def finish(*processes: BaseProcess, seconds: float = 120) -> list[int | None]:
    """Wait and return the exit codes: 0, or minus the signal's number."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _child(config: RunConfig, setup: Callable[[], list[Observer]] | None, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment})
    module = type(config).__module__
    if module == "slabformer.converting.config":
        train = importlib.import_module("slabformer.converting.run").convert
    else:
        train = importlib.import_module(module.replace(".config", ".train")).train  # of its task
    try:
        train(config, observers=setup() if setup is not None else [])
    except StoppedError as stopped:
        raise SystemExit(stopped.exit_code) from None


def die_in_checkpoint(number: int, moment: str) -> list[Observer]:
    """Setup: die while the ``number``-th checkpoint is written, "half written", "before rename" or "after rename"."""
    rename, seen = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal seen
        seen += target.suffix == ".pt"
        if target.suffix != ".pt" or seen != number:
            return rename(source, target)
        if moment == "half written":
            os.truncate(source, source.stat().st_size // 2)
        if moment == "after rename":
            rename(source, target)
        return die()

    os.replace = replace
    return []


def weights(folder: Path, name: str = "model") -> dict[str, Tensor]:
    """Tensors of ``name.safetensors`` in a run's folder."""
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, first {different[0]}"
