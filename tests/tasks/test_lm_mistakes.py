"""What goes wrong in training a language model is told in a line, before it starts where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from language_models import SIZES, tiny_config
from slabformer.tasks.engine.config import FadeConfig
from slabformer.tasks.engine.nonfinite import NonFiniteError
from slabformer.tasks.language.config import ModelConfig, TrainConfig
from slabformer.tasks.language.corpus import DataConfig
from slabformer.tasks.language.train import train
from slabformer.tasks.language.trainer import LanguageTrainer


def test_a_nan_ends_the_run_and_names_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LanguageTrainer.training_step

    def poison(self: LanguageTrainer, model: nn.Module, inputs: Any, *rest: Any) -> Any:
        if self.state.global_step == 7:
            with torch.no_grad():
                model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(float("nan"))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(LanguageTrainer, "training_step", poison)
    with pytest.raises(NonFiniteError) as failure:
        train(tiny_config(tmp_path / "run"))
    assert str(failure.value) == (
        "the loss became non-finite in step 8, first in the output of model.layers.1.mlp.up_proj (Linear); "
        f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-5'}"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(path="EMPTY")}, "holds no text"),
        ({"model": ModelConfig(**SIZES, context=16, vocab_size=280)}, "a vocabulary of 280"),
        ({"model": ModelConfig(**SIZES, context=4096)}, "fewer than one block of 4096"),
        (
            {"model": ModelConfig(hidden_size=30, num_attention_heads=2)},
            "hidden_size must be a multiple of twice the 2 heads",
        ),
        ({"model": ModelConfig(**SIZES, args={"num_key_value_heads": 3})}, "must divide the 2 heads, got 3"),
        (
            {"model": ModelConfig(**SIZES, args={"num_key_value_head": 1})},
            "unknown model.args.num_key_value_head; did you mean 'num_key_value_heads'",
        ),
    ],
    ids=["empty", "vocabulary", "short", "heads", "groups", "argument"],
)
def test_mistakes_are_told_before_training(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    if changes.get("data") is not None:
        changes = {"data": DataConfig(path=str(tmp_path / "empty.txt"))}
    with pytest.raises(ValueError, match=message):
        train(tiny_config(tmp_path / "run", **changes))
    assert train(tiny_config(tmp_path / "run", steps=3)).summary["steps"] == 3  # the folder is free for the mended run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 50}, r"warmup_steps must be below steps \(50\), got 50"),
        ({"data": DataConfig(path="a", stream=True, validation=1)}, "a stream has no end to wait for; set recalibrate"),
    ],
    ids=["steps", "warm-up", "stream"],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_a_fade_that_outlasts_training_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule would end after training"):
        FadeConfig(warmup=0.5, fade=0.8)
