"""Two ranks of the engine: the same statistics on both, and both stop at one's NaN, with words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import slabformer as sf
from distributed import run_ranks
from slabformer.models.llama import SlabLlamaConfig, SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.devices import create_accelerator
from slabformer.tasks.engine.ema import ModelEma
from slabformer.tasks.engine.loop import Trainer
from slabformer.tasks.engine.nonfinite import NonFiniteError
from slabformer.tasks.engine.parts import LoopConfig
from slabformer.tasks.language.trainer import LanguageTrainer
from tolerances import EXACT, FLOAT32, assert_close

pytestmark = pytest.mark.slow

C = 6


class OwnPoints:
    """Another rank's batches are others; batch ``bad`` of rank 1 holds a NaN."""

    def __init__(self, rank: int, num_batches: int = 4, bad: int | None = None) -> None:
        self.rank, self.num_batches, self.bad, self.start = rank, num_batches, bad, 0

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        pass

    def set_start(self, batch_index: int) -> None:
        self.start = batch_index

    def batch(self, index: int) -> Tensor:
        x = self.rank + 3 * torch.randn(5, 2, C, generator=torch.Generator().manual_seed(10 * self.rank + index))
        if index == self.bad and self.rank == 1:
            x[0, 0, 0] = float("nan")
        return x

    def __iter__(self) -> Any:
        return (self.batch(index) for index in range(self.start, len(self)))


class TokensFirst(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1))


def batch_norms() -> nn.Module:
    return TokensFirst(nn.BatchNorm1d(C), nn.Linear(C, C), nn.BatchNorm1d(C, momentum=None), nn.Linear(C, 1))


def rep_norms() -> nn.Module:
    net = nn.Sequential(sf.PRepBN(C), nn.Linear(C, C), sf.RepBN(C), nn.Linear(C, 1))
    net[0].set_gamma(0)
    sf.sync_norms_(net)
    return net


def launched(rank: int, num_ranks: int) -> None:
    """What accelerate looks for; the process group is there already."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"})


def make_trainer(rank: int, num_ranks: int, build: Callable[[], nn.Module], **options: Any) -> Trainer:
    launched(rank, num_ranks)
    torch.manual_seed(0)
    model = build()
    return Trainer(
        accelerator=create_accelerator(device="cpu"),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.1)),
        loader=OwnPoints(rank, bad=options.pop("bad", None)),
        step_fn=lambda model, x: model(x).square().mean(),
        config=LoopConfig(epochs=1, **options.pop("config", {})),
        ema=ModelEma(model, decay=0.5),
        **options,
    )


def trained(rank: int, num_ranks: int, build: Callable[[], nn.Module], lr: float) -> list[dict[str, Tensor]]:
    trainer = make_trainer(rank, num_ranks, build, lr=lr, config={"accumulate": 2})
    assert trainer.ema is not None
    assert not trainer._update.train_step.broadcast_buffers  # rank 0's would take the place of all ranks'
    trainer.fit()
    return [dict(trainer.model.state_dict()), dict(trainer.ema.state_dict())]


def words_of(call: Callable[[], object]) -> str:
    with pytest.raises(NonFiniteError) as caught:
        call()
    return str(caught.value)


def nan_in_a_batch(rank: int, num_ranks: int, build: Callable[[], nn.Module], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return words_of(
        make_trainer(rank, num_ranks, build, bad=2, store=CheckpointStore(folder), config={"save_every": 2}).fit
    )


def lost_tensor(rank: int, num_ranks: int, folder: Path) -> str:
    trainer = make_trainer(rank, num_ranks, batch_norms, store=CheckpointStore(folder))
    if rank == 1:
        trainer.model[1].weight.data[0, 0] = float("inf")
    trainer.position.step = 1
    return words_of(trainer.save)


def full_disk(rank: int, num_ranks: int, folder: Path) -> str:
    class FullStore(CheckpointStore):
        def save(self, step: int, state: dict[str, Any]) -> Path:
            raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(OSError, match="No space left on device") as caught:
        make_trainer(rank, num_ranks, batch_norms, store=FullStore(folder)).fit()
    return str(caught.value)


def nan_in_a_language_model(rank: int, num_ranks: int, folder: Path) -> str:
    launched(rank, num_ranks)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SlabLlamaForCausalLM(SlabLlamaConfig(vocab_size=48, max_position_embeddings=16, **sizes))
    sf.sync_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0)
    args = TrainingArguments(str(folder), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to="none",
                             disable_tqdm=True, logging_steps=1, logging_nan_inf_filter=False)  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 48, (16, 8))]
    trainer = LanguageTrainer(model, args, train_dataset=rows)
    if rank == 1:
        model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, output: output * float("nan") if trainer.state.global_step else None
        )
    return words_of(trainer.train)


def everything(rank: int, num_ranks: int, folder: str) -> dict[str, Any]:
    """All of it in one pair of processes, whose start takes longer than the rest."""
    here, place = (rank, num_ranks), Path(folder)
    return {
        "batch_norms": trained(*here, batch_norms, lr=0.1),
        "rep_norms": trained(*here, rep_norms, lr=0.1),
        "standing": trained(*here, batch_norms, lr=0.0),
        "nan, batch_norms": nan_in_a_batch(*here, batch_norms, place / "one"),
        "nan, rep_norms": nan_in_a_batch(*here, rep_norms, place / "other"),
        "full": full_disk(*here, place / "full"),
        "lost": lost_tensor(*here, place / "lost"),
        "language": nan_in_a_language_model(*here, place / "language"),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(everything, tmp_path_factory.mktemp("meeting"), str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("norms", ["batch_norms", "rep_norms"])
def test_all_ranks_end_with_the_same_model_and_average(ranks: list[dict[str, Any]], norms: str) -> None:
    first, second = (rank[norms] for rank in ranks)
    for ours, theirs in zip(first, second, strict=True):
        for name, value in ours.items():
            assert_close(value, theirs[name], EXACT)


def test_batch_norm_averages_the_statistics_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    state = ranks[0]["standing"][0]
    mean, var = torch.zeros(C), torch.ones(C)
    for index in range(4):
        batches = [OwnPoints(rank).batch(index).flatten(0, 1) for rank in range(2)]
        mean = 0.9 * mean + 0.1 * torch.stack([x.mean(0) for x in batches]).mean(0)
        var = 0.9 * var + 0.1 * torch.stack([x.var(0) for x in batches]).mean(0)
    assert_close(state["0.running_mean"], mean, FLOAT32)
    assert_close(state["0.running_var"], var, FLOAT32)


@pytest.mark.parametrize("norms", ["batch_norms", "rep_norms"])
def test_the_nan_of_one_rank_stops_both_with_the_same_words(ranks: list[dict[str, Any]], norms: str) -> None:
    first, second = (rank[f"nan, {norms}"] for rank in ranks)
    assert first == second
    assert "became non-finite in step 3 (epoch 1, batch 3): the batch itself is not finite (rank 1)" in first
    assert "the last good checkpoint is" in first


def test_a_tensor_that_only_one_rank_has_lost_stops_both_before_the_checkpoint(ranks: list[dict[str, Any]]) -> None:
    assert [rank["lost"] for rank in ranks] == ["1.weight (rank 1) is not finite after step 1; nothing was saved"] * 2


def test_a_checkpoint_that_cannot_be_written_stops_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["full"] for rank in ranks)
    assert first.startswith("[Errno 28] No space left on device")
    assert second == f"{first} (rank 0)"


def test_a_language_model_stops_on_both_ranks_too(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["language"] for rank in ranks)
    assert first == second
    assert "step 2, first in the output of model.layers.0.mlp (LlamaMLP) (rank 1); there is no checkpoint" in first
