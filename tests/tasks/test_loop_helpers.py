"""What stands around the loop: averaged weights, precision, random state, rows of figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer.tasks.engine.devices import create_accelerator
from slabformer.tasks.engine.ema import ModelEma
from slabformer.tasks.engine.observers import CsvFile
from slabformer.tasks.engine.seeds import random_state, reseed, set_random_state


def test_ema_averages_weights_and_copies_gamma() -> None:
    model = nn.Sequential(nn.Linear(6, 8), sf.PRepBN(8), nn.Linear(8, 2))
    ema = ModelEma(model, decay=0.5)
    model[1].set_gamma(0.25)
    start = model[0].weight.detach().clone()
    ema.update(model, 1)
    with torch.no_grad():
        model[0].weight += 1
    model[1].set_gamma(0.0)
    ema.update(model, 2)
    torch.testing.assert_close(ema.module[0].weight, start + 0.5)
    assert (float(ema.module[1].gamma), ema.module[1].phase) == (0.0, "done")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an accelerator"):
        create_accelerator("fp16", "cpu")


def test_random_state_comes_back() -> None:
    import random

    import numpy as np

    reseed(1, 2, 3)
    state = random_state()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    set_random_state(state)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first
    reseed(1, 2, 4)
    assert torch.rand(3).tolist() != first[0]


def test_csv_rows_are_cut_back_and_half_a_line_is_dropped(tmp_path: Path) -> None:
    file = CsvFile(tmp_path / "metrics.csv", ["epoch", "loss", "extra"])
    file.cut("epoch", 1)
    for epoch in (1, 2, 3):
        file.append({"epoch": epoch, "loss": epoch / 10, "unknown": 7.0})
    with file.path.open("a") as handle:
        handle.write("4,0.")
    assert file.rows() == [{"epoch": e, "loss": e / 10} for e in (1, 2, 3)]
    file.cut("epoch", 3)
    file.append({"epoch": 3, "loss": 0.5})
    assert file.path.read_text() == "epoch,loss,extra\n1,0.1,\n2,0.2,\n3,0.5,\n"
