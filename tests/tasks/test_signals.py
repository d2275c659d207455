"""Signals end a run after its step, wherever its loader's workers come from."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from children import ended
from coco_files import write_root
from image_folders import fill_splits
from slabformer.tasks.classification.config import AugmentConfig, DataConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.detection.config import DetectionAugment, DetectionData
from slabformer.tasks.detection.loader import create_loader as create_detection_loader
from tolerances import PATIENCE

#: prints a line when a worker has delivered, and goes on as training does: it needs one more batch to finish its step
SCRIPT = """
import multiprocessing, sys, time
from torch.utils.data import Dataset
from slabformer.tasks.engine.order import BatchOrder, decoding_loader
from slabformer.tasks.engine.signals import StopSignals

class Numbers(Dataset):
    def __len__(self): return 8
    def __getitem__(self, key): return key[1]

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    order = BatchOrder(8, batch_size=1, seed=0, rank=0, world_size=1, shuffle=False, drop_last=True)
    for _ in range(2):
        loader, seen = decoding_loader(Numbers(), order, 1, list), []
        with StopSignals() as signals:
            for batch in loader:
                seen += batch
                if len(seen) == 1:
                    print("delivered", flush=True)
                    while not signals.received:
                        time.sleep(0.01)
                    time.sleep(0.1)
        print(signals.received, seen, flush=True)
        list(loader)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups that take signals")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(start: str, tmp_path: Path) -> None:
    """One process takes SIGINT in its first epoch and SIGTERM in its second."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", start], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with ended([process]):
        assert process.stdout is not None
        for signum in (signal.SIGINT, signal.SIGTERM):
            assert process.stdout.readline() == "delivered\n"
            os.killpg(process.pid, signum)
            assert process.stdout.readline() == f"{int(signum)} [0, 1, 2, 3, 4, 5, 6, 7]\n"
        assert process.wait(timeout=PATIENCE) == 0


def assert_sent_whole(loader: Any) -> None:
    """What a worker that is not forked gets makes the batch that this process would make."""
    dataset, collate, start = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    here, there = (
        fn([data[0, index] for index in (1, 0)])
        for fn, data in ((loader.collate_fn, loader.dataset), (collate, dataset))
    )
    assert start is loader.worker_init_fn
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in (here, there)]
    images = [getattr(batch, "images", batch) for batch in batches]
    torch.testing.assert_close(list(images[1]), list(images[0]), rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["none", "timm"])
def test_what_classifies_can_be_sent_to_workers_that_are_not_forked(policy: str, tmp_path: Path) -> None:
    fill_splits(tmp_path / "images", train=4, validation=2)
    for path in (str(tmp_path / "images"), "digits"):
        data = DataConfig(path=path, image_size=16)
        for split in ("train", "validation"):
            loader = create_loader(data, AugmentConfig(policy=policy), split, batch_size=2, seed=0)  # type: ignore[arg-type]
            inner = getattr(loader, "loader", None)
            assert (inner is None) == (path == "digits" and (policy, split) != ("timm", "train"))  # held in memory
            if inner is not None:
                assert_sent_whole(inner)


def test_what_detects_can_be_sent_to_workers_that_are_not_forked(tmp_path: Path) -> None:
    data = DetectionData(path=str(write_root(tmp_path)))
    for split in ("train", "validation"):
        inner = create_detection_loader(data, DetectionAugment(), split, batch_size=2, seed=0).loader
        assert_sent_whole(inner)
