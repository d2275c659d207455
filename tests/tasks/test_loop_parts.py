"""A loss that is a sum: trained on as a whole, told by part; batches that are objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csv_files import csv_rows
from slabformer import PRepBN, ProgressiveSchedule
from slabformer.progressive import Guard
from slabformer.tasks.engine.devices import create_accelerator
from slabformer.tasks.engine.loop import Trainer
from slabformer.tasks.engine.nonfinite import NonFiniteError, tensors_in
from slabformer.tasks.engine.observers import CsvObserver, Observer, StepReport
from slabformer.tasks.engine.parts import LoopConfig, num_samples


@dataclass
class Points:
    """Points in lists, as images of different sizes come."""

    rows: list[Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device, non_blocking: bool = False) -> Points:
        return Points([row.to(device) for row in self.rows])


class TwoBatches:
    def __init__(self, bad: bool = False) -> None:
        self.bad, self.start = bad, 0

    def __len__(self) -> int:
        return 2

    def set_epoch(self, epoch: int) -> None: ...

    def set_start(self, batch_index: int) -> None:
        self.start = batch_index

    def __iter__(self) -> Iterator[Points]:
        rows = torch.arange(12.0).reshape(4, 3)
        batches = [Points([*rows[:3]]), Points([*rows[3:] * (float("nan") if self.bad else 1.0)])]
        yield from batches[self.start :]


def two_losses(model: nn.Module, batch: Points) -> dict[str, Tensor]:
    out = model(torch.stack(batch.rows))
    return {"square": out.square().mean(), "mean": out.mean()}


def make_trainer(observers: list[Observer], *, accumulate: int = 1, bad: bool = False, **parts: Any) -> Trainer:
    model = parts.pop("model", nn.Linear(3, 1))
    if isinstance(model, nn.Linear):
        nn.init.constant_(model.weight, 0.5)
        nn.init.zeros_(model.bias)
    settings = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "step_fn": two_losses,
        "config": LoopConfig(epochs=1, log_every=1, accumulate=accumulate),
    }
    return Trainer(
        accelerator=create_accelerator(device="cpu"),
        model=model,
        loader=TwoBatches(bad),
        batch_names=lambda index: [f"file {index}"],
        observers=observers,
        **settings | parts,
    )


class Reports(Observer):
    def __init__(self) -> None:
        self.seen: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append(report)


def test_parts_are_weighed_by_samples_and_their_sum_is_trained(tmp_path: Path) -> None:
    reports = Reports()
    trainer = make_trainer([reports, CsvObserver(tmp_path, ["epoch"], ["square", "mean"])], accumulate=2)
    trainer.fit()
    sums = torch.arange(12.0).reshape(4, 3).sum(1) / 2  # what the first weights give
    square, mean = float(sums.square().mean()), float(sums.mean())
    (report,) = reports.seen
    assert report.parts == pytest.approx({"square": square, "mean": mean})
    assert report.loss == pytest.approx(square + mean)
    weight = trainer.model.get_parameter("weight")
    reference = torch.full((1, 3), 0.5, requires_grad=True)
    out = torch.arange(12.0).reshape(4, 3) @ reference.T
    (out.square().mean() + out.mean()).backward()
    torch.testing.assert_close(weight, reference - 0.01 * reference.grad)
    (row,) = csv_rows(tmp_path / "steps.csv")
    assert float(row["square"]) == pytest.approx(square)
    assert float(row["loss"]) == pytest.approx(square + mean)


def test_a_batch_that_is_an_object_knows_its_length_and_shows_its_tensors() -> None:
    batch = next(iter(TwoBatches()))
    assert num_samples(batch) == 3
    assert [len(tensor) for tensor in tensors_in(batch)] == [3, 3, 3]
    assert num_samples((torch.zeros(5, 2), torch.zeros(5))) == 5


def test_a_bad_batch_that_is_an_object_is_named() -> None:
    with pytest.raises(NonFiniteError, match="the batch itself is not finite, on file 1"):
        make_trainer([], bad=True).fit()


def fading_trainer(accumulate: int, **settings: Any) -> tuple[Trainer, Reports]:
    reports = Reports()
    model = nn.Sequential(PRepBN(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    schedule = ProgressiveSchedule(model, 100, fade=0.8, optimizer=optimizer, **settings)
    config = LoopConfig(epochs=40, log_every=1, accumulate=accumulate)
    parts = {"model": model, "optimizer": optimizer, "gamma_schedule": schedule, "config": config}
    return make_trainer([reports], step_fn=square, **parts), reports


def square(model: nn.Module, batch: Points) -> Tensor:
    return model(torch.stack(batch.rows).unsqueeze(1).expand(-1, 2, -1)).square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_alignment_of_fading_norms_is_a_part_of_the_loss(accumulate: int) -> None:
    trainer, reports = fading_trainer(accumulate, align=0.5, guard=None)
    trainer.fit()
    first = reports.seen[0]
    assert first.parts["alignment"] > 0
    assert first.loss == pytest.approx(sum(first.parts.values()), rel=1e-5)


def test_gradients_that_explode_let_gamma_wait() -> None:
    trainer, _ = fading_trainer(2, guard=Guard(every=1))
    trainer.step_fn = lambda model, batch: square(model, batch) * (1e3 if trainer.position.step == 20 else 1.0)
    trainer.fit()
    assert trainer.gamma_schedule is not None
    assert trainer.gamma_schedule.state_dict()["waited"] == 1
