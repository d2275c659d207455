"""The callback in a plain Trainer, on somebody else's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import slabformer as sf
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.language.callback import ProgressiveCallback
from slabformer.tasks.language.folders import load_model_folder
from slabformer.tasks.language.fusing import check_finished
from tolerances import EXACT, assert_close

STEPS = 10
TOKENS = torch.randint(0, 48, (40, 12), generator=torch.Generator().manual_seed(1))


def stock_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, max_position_embeddings=16, tie_word_embeddings=False, **sizes))


def converted_llama() -> LlamaForCausalLM:
    model = stock_llama()
    sf.convert_norms_(model)
    return model


def trainer_of(
    model: LlamaForCausalLM, folder: Path, *callbacks: TrainerCallback, steps: int = STEPS, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, **settings | changes)
    blocks = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(model, args, train_dataset=blocks, callbacks=list(callbacks))


def state_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *args, **kwargs: None)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_stock_model_loses_its_norms(tmp_path: Path) -> None:
    model = converted_llama()
    trainer = trainer_of(model, tmp_path, ProgressiveCallback(warmup=0.2, fade=0.5))
    trainer.train()
    logged = [row["gamma"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])
    assert {norm.phase for norm in prepbn_modules(model).values()} == {"done"}
    inputs = {"input_ids": TOKENS[:2], "use_cache": False}
    model.eval()
    fused, report = sf.fuse(model, (), inputs)
    assert (report.num_folded, report.num_kept, repbn_modules(fused)) == (5, 0, {})
    sf.verify(model, fused, inputs)


def test_gamma_counts_optimizer_steps_whatever_is_accumulated(tmp_path: Path) -> None:
    model = converted_llama()
    trainer = trainer_of(
        model, tmp_path, ProgressiveCallback(), gradient_accumulation_steps=3, per_device_train_batch_size=2
    )
    trainer.train()
    logged = [row["gamma"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([max(0, 1 - step / 8) for step in range(1, STEPS + 1)])


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    whole = converted_llama()
    trainer_of(whole, tmp_path / "whole", ProgressiveCallback()).train()
    halves, saving = tmp_path / "halves", {"save_strategy": "steps", "save_steps": 5}
    trainer_of(converted_llama(), halves, ProgressiveCallback(), StopAt(5), **saving).train()
    resumed, callback = converted_llama(), ProgressiveCallback()
    trainer_of(resumed, halves, callback, **saving).train(resume_from_checkpoint=str(halves / "checkpoint-5"))
    assert callback.gamma == 0
    expected, actual = state_of(whole), state_of(resumed)
    for name, value in expected.items():
        assert_close(actual[name], value, EXACT)


def test_ending_too_early_is_warned_about_with_the_steps_that_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = converted_llama()
    trainer_of(model, tmp_path, ProgressiveCallback(), StopAt(3)).train()
    assert "training ended with gamma 0.625" in caplog.text
    assert "5 of 10 steps are missing until it is gone" in caplog.text
    with pytest.raises(ValueError, match="gamma"):
        sf.fuse(model.eval(), (), {"input_ids": TOKENS[:2]})


def test_a_finished_schedule_is_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(converted_llama(), tmp_path, ProgressiveCallback()).train()
    assert "gamma" not in caplog.text


def test_a_model_that_was_not_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no PRepBN to fade; call convert_norms_"):
        trainer_of(stock_llama(), tmp_path, ProgressiveCallback()).train()


@pytest.mark.parametrize("recalibrated", [False, True], ids=["training", "recalibration"])
def test_padding_moves_no_statistics(recalibrated: bool, tmp_path: Path) -> None:
    def statistics(padding: int) -> Tensor:
        model = converted_llama()
        trainer = trainer_of(model, tmp_path, ProgressiveCallback(), steps=2)
        rows = [{"input_ids": row.clone(), "attention_mask": torch.ones_like(row), "labels": row} for row in TOKENS[:8]]
        for row in rows:
            row["input_ids"][6:], row["attention_mask"][6:] = padding, 0
            row["labels"] = row["labels"].masked_fill(row["attention_mask"] == 0, -100)
        trainer.train_dataset = rows
        trainer.train()
        if recalibrated:
            sf.recalibrate_(model, trainer.get_train_dataloader())
        return next(iter(repbn_modules(model).values())).running_mean

    assert_close(statistics(padding=3), statistics(padding=7), EXACT)


def test_a_checkpoint_says_what_was_converted_and_how_many_steps_miss(tmp_path: Path) -> None:
    model = converted_llama()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(model, tmp_path, ProgressiveCallback(fade=0.5), StopAt(3), **saving).train()
    loaded = load_model_folder(tmp_path / "checkpoint-3")
    expected, actual = state_of(model), state_of(loaded)
    for name, value in expected.items():
        assert_close(actual[name], value, EXACT)
    with pytest.raises(ValueError, match=r"gamma is 0\.4\); 2 more steps of its run would finish its schedule"):
        check_finished(loaded, tmp_path / "checkpoint-3")
