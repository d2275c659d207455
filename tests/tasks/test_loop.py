"""What the loop adds up: accumulation, clipping, positions, reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import slabformer as sf
from distributed import run_ranks
from slabformer.tasks.engine.checkpoint import CheckpointStore, read_checkpoint
from slabformer.tasks.engine.devices import create_accelerator
from slabformer.tasks.engine.ema import ModelEma
from slabformer.tasks.engine.loop import Trainer
from slabformer.tasks.engine.nonfinite import NonFiniteError
from slabformer.tasks.engine.observers import Observer, RunStart, StepReport
from slabformer.tasks.engine.parts import LoopConfig
from slabformer.tasks.engine.update import Update

Batch = tuple[Tensor, Tensor]


class Points:
    """Random points and labels; batch ``i`` of an epoch is always the same."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes, self.epoch, self.start = sizes, 0, 0

    def __len__(self) -> int:
        return len(self.sizes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def set_start(self, batch_index: int) -> None:
        self.start = batch_index

    def batch(self, epoch: int, index: int) -> Batch:
        generator = torch.Generator().manual_seed(100 * epoch + index)
        x = torch.randn(self.sizes[index], 6, generator=generator)
        return x, (x.sum(1) > 0).long()

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(self.epoch, index) for index in range(self.start, len(self)))


class Recorder(Observer):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_start(self, start: RunStart) -> None:
        self.events.append(start)

    def on_step(self, report: StepReport) -> None:
        self.events.append(report)

    def on_epoch(self, row: dict[str, float]) -> None:
        self.events.append(row)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_trainer(
    sizes: tuple[int, ...] = (4, 4, 4), model: nn.Module | None = None, lr: float = 0.1, **options: Any
) -> Trainer:
    config = LoopConfig(**{"epochs": 1, "log_every": 1, **options.pop("config", {})})
    torch.manual_seed(0)
    model = model or nn.Linear(6, 2)
    return Trainer(
        accelerator=create_accelerator(device="cpu"),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        loader=Points(sizes),
        step_fn=cross_entropy,
        config=config,
        **options,
    )


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4), (4, 4, 4, 4, 2), (3, 5, 4)], ids=str)
def test_accumulated_batches_give_the_gradient_of_all_their_samples(sizes: tuple[int, ...]) -> None:
    trainer = make_trainer(sizes, config={"accumulate": 2})
    expected = nn.Linear(6, 2)
    expected.load_state_dict(trainer.model.state_dict())
    for start in range(0, len(sizes), 2):
        batches = [trainer.loader.batch(0, index) for index in range(start, min(start + 2, len(sizes)))]
        loss = cross_entropy(expected, (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])))
        grads = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(expected.parameters(), grads, strict=True):
                parameter -= 0.1 * grad
    trainer.fit()
    torch.testing.assert_close(dict(trainer.model.state_dict()), dict(expected.state_dict()), rtol=1e-6, atol=1e-7)
    assert trainer.position.step == -(-len(sizes) // 2)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    trainer = make_trainer((4,), lr=1.0, config={"clip_norm": 1e-3})
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.fit()
    moved = [p.detach() - b for p, b in zip(trainer.model.parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_observers_hear_every_step_and_epoch() -> None:
    recorder = Recorder()
    trainer = make_trainer(
        (4, 4, 2), config={"epochs": 2, "log_every": 2}, observers=[recorder], evaluate=lambda _: {"top1": 0.5}
    )
    trainer.fit()
    assert recorder.of(RunStart) == [RunStart(epochs=2, steps_per_epoch=3, epoch=0, step=0)]
    steps = recorder.of(StepReport)
    assert [(s.epoch, s.step, s.samples) for s in steps] == [
        (1, 1, 4),
        (1, 2, 4),
        (1, 3, 2),
        (2, 4, 4),
        (2, 5, 4),
        (2, 6, 2),
    ]
    assert [s.loss is not None for s in steps] == [False, True] * 3
    rows = recorder.of(dict)
    assert [(row["epoch"], row["step"], row["top1"]) for row in rows] == [(1, 3, 0.5), (2, 6, 0.5)]


def test_the_epoch_loss_is_the_mean_over_samples() -> None:
    recorder = Recorder()
    trainer = make_trainer((4, 4, 2), lr=0.0, observers=[recorder])
    trainer.fit()
    batches = list(Points((4, 4, 2)))
    everything = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert recorder.of(dict)[0]["train_loss"] == pytest.approx(
        cross_entropy(trainer.model, everything).item(), rel=1e-6
    )


def test_best_waits_until_gamma_is_0() -> None:
    model = nn.Sequential(nn.Linear(6, 8), sf.PRepBN(8), nn.Linear(8, 2))
    scores = iter([0.9, 0.8, 0.5, 0.6, 0.55])
    best: list[float] = []
    trainer = make_trainer(model=model, config={"epochs": 5}, evaluate=lambda _: {"top1": next(scores)})
    trainer.gamma_schedule = sf.ProgressiveSchedule(model, total_steps=15, fade=0.6)
    trainer.best_metric, trainer.on_best = "top1", lambda t: best.append(t.best)
    trainer.fit()
    assert best == [0.5, 0.6]


def test_evaluation_may_be_rarer_but_never_skips_the_last_epoch() -> None:
    recorder = Recorder()
    trainer = make_trainer(config={"epochs": 5, "eval_every": 2}, observers=[recorder], evaluate=lambda _: {"top1": 1})
    trainer.fit()
    assert ["top1" in row for row in recorder.of(dict)] == [False, True, False, True, True]


def test_gamma_moves_once_an_optimizer_step() -> None:
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(6, 8), sf.PRepBN(8), nn.Linear(8, 2))
    trainer = make_trainer((4,) * 8, model=model, config={"accumulate": 2}, observers=[recorder])
    trainer.gamma_schedule = sf.ProgressiveSchedule(model, total_steps=4, fade=1.0)
    trainer.fit()
    assert [s.gamma for s in recorder.of(StepReport)] == [1.0, 0.75, 0.5, 0.25]


def test_the_average_has_the_gamma_that_a_step_ended_with() -> None:
    """Averaged before gamma moves, the last average would still be fading."""
    model = nn.Sequential(nn.Linear(6, 8), sf.PRepBN(8), nn.Linear(8, 2))
    trainer = make_trainer((4,) * 4, model=model)
    trainer.gamma_schedule = sf.ProgressiveSchedule(model, total_steps=4, fade=1.0)
    trainer.ema = ModelEma(model, decay=0.5)
    gammas: list[tuple[float, float]] = []
    update = trainer.ema.update

    def noted(*args: Any) -> None:
        update(*args)
        gammas.append((float(model[1].gamma), float(trainer.ema.module[1].gamma)))

    trainer.ema.update = noted
    trainer.fit()
    assert gammas == [(0.75, 0.75), (0.5, 0.5), (0.25, 0.25), (0.0, 0.0)]
    fused, _ = sf.fuse(trainer.ema.module.eval(), torch.randn(4, 6))
    assert fused is not None


def _buffers_after_a_step(rank: int, num_ranks: int) -> list[Tensor]:
    model = nn.Linear(6, 2)
    model.register_buffer("own", torch.zeros(1))
    accelerator = SimpleNamespace(prepare_model=DistributedDataParallel, prepare_optimizer=lambda optimizer: optimizer)
    update = Update(accelerator, model, torch.optim.SGD(model.parameters(), 0.1), cross_entropy, LoopConfig(epochs=1))
    model.own.fill_(rank)  # wrapping has made all ranks' alike
    for _ in range(2):
        update.train_step((torch.randn(4, 6), torch.zeros(4, dtype=torch.long)))
    return [model.own]


def test_no_rank_sends_its_buffers_to_the_others(tmp_path: Path) -> None:
    """Statistics are shared by the norms themselves; what rank 0 would send each step overwrites those of the rest."""
    buffers = run_ranks(_buffers_after_a_step, tmp_path)
    assert [float(own) for (own,) in buffers] == [0.0, 1.0]


def test_one_epoch_leaves_the_model_unwrapped(tmp_path: Path) -> None:
    trainer = make_trainer(store=CheckpointStore(tmp_path))
    trainer.fit()
    assert list(trainer.model.state_dict()) == ["weight", "bias"]
    assert "forward" not in vars(trainer.model)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3.pt"]


class Overflowing(Points):
    """One batch is too large for the model, though finite."""

    def __init__(self, sizes: tuple[int, ...], epoch: int, index: int, factor: float) -> None:
        super().__init__(sizes)
        self.bad, self.factor = (epoch, index), factor

    def batch(self, epoch: int, index: int) -> Batch:
        x, labels = super().batch(epoch, index)
        return (x * self.factor if (epoch, index) == self.bad else x), labels


@pytest.mark.parametrize("check_every", [1, 100], ids=["at once", "long after"])
@pytest.mark.parametrize(
    ("factor", "culprit"),
    [(1e38, "first in the output of 1 (Linear)"), (float("inf"), "the batch itself is not finite")],
    ids=["overflow", "bad batch"],
)
def test_a_non_finite_step_is_traced_however_late_it_is_seen(
    check_every: int, factor: float, culprit: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 2))
    with torch.no_grad():
        model[1].weight.fill_(10.0)
    trainer = make_trainer(
        (4,) * 7, model=model, config={"accumulate": 2, "epochs": 2}, store=CheckpointStore(tmp_path), lr=1e-3
    )
    trainer.loader = Overflowing((4,) * 7, 1, 3, factor)
    trainer.batch_names = lambda index: [f"sample of {index}"]
    trainer._check_every = check_every
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert f"in step 6 (epoch 2, batch 3): {culprit}, on sample of 3; the last good" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4.pt"]


def test_bf16_autocasts_the_step_and_keeps_weights_in_float32() -> None:
    seen = []
    trainer = make_trainer()
    config = trainer.config
    trainer = Trainer(
        accelerator=create_accelerator("bf16", "cpu"),
        model=trainer.model,
        optimizer=trainer.optimizer,
        loader=trainer.loader,
        step_fn=lambda model, batch: (seen.append(model(batch[0]).dtype), cross_entropy(model, batch))[1],
        config=config,
    )
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert trainer.model.weight.dtype == torch.float32


def test_a_checkpoint_of_another_model_or_optimizer_is_refused_in_words(tmp_path: Path) -> None:
    def adam(width: int, folder: Path) -> Trainer:
        model = nn.Linear(6, width)
        trainer = make_trainer(model=model, store=CheckpointStore(folder))
        trainer.optimizer = torch.optim.AdamW(model.parameters())
        return trainer

    trainer = adam(2, tmp_path)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.position.step = 1
    trainer.save()
    state = read_checkpoint(tmp_path / "checkpoint-1.pt")
    with pytest.raises(
        ValueError, match=r"another model: 2 tensors differ \(first: bias, \(2,\) in the checkpoint, \(3,\)"
    ):
        adam(3, tmp_path).resume()
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 6)
    CheckpointStore(tmp_path).save(1, state)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is \(3, 6\), the parameter \(2, 6\)"):
        adam(2, tmp_path).resume()
    CheckpointStore(tmp_path).save(1, {name: part for name, part in state.items() if name != "meter"})
    with pytest.raises(ValueError, match="the checkpoint holds no 'meter'"):
        adam(2, tmp_path).resume()
