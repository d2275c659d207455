"""The callback in a plain Trainer, on somebody else's model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import slabformer as sf
from slabformer.nn.attention_masks import keep_padding_out_everywhere_
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.language.callback import ProgressiveCallback
from slabformer.tasks.language.folders import load_model_folder
from slabformer.tasks.language.fusing import check_finished
from students import bert
from tolerances import EXACT, FLOAT32, assert_close

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
    model: PreTrainedModel, folder: Path, *callbacks: TrainerCallback, steps: int = STEPS, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, **settings | changes)
    blocks = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(model, args, train_dataset=blocks, eval_dataset=blocks, callbacks=list(callbacks))


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


def test_a_stock_model_loses_its_norms_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = converted_llama()
    trainer = trainer_of(model, tmp_path, ProgressiveCallback(warmup=0.2, fade=0.5))
    trainer.train()
    assert "gamma" not in caplog.text
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


def test_the_alignment_of_norms_is_part_of_the_loss(tmp_path: Path) -> None:
    losses = []
    for align in (0.0, 1.0):
        callback = ProgressiveCallback(warmup=0.5, fade=0.5, align=align)
        trainer = trainer_of(converted_llama(), tmp_path, callback, steps=4)
        trainer.train()
        losses.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert losses[1] > losses[0] + 0.01
    pickle.dumps(callback)
    trainer.model(input_ids=TOKENS[:2], labels=TOKENS[:2])  # the hook is gone


def test_a_run_goes_on_while_gamma_waits(tmp_path: Path) -> None:
    def spoil(callback: ProgressiveCallback) -> None:
        assert callback.schedule is not None
        for norm in callback.schedule._norms.values():
            norm.rep.running_var.mul_(1e4)

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 59:
                spoil(progressive)

    progressive = ProgressiveCallback(fade=0.9)
    saving = {"save_strategy": "steps", "save_steps": 65, "logging_steps": 1, "learning_rate": 1e-4}
    trainer_of(converted_llama(), tmp_path, progressive, Spoil(), steps=80, **saving).train()
    assert progressive.schedule is not None
    assert progressive.schedule.state_dict()["waited"] > 0
    again = ProgressiveCallback(fade=0.9)
    trainer = trainer_of(converted_llama(), tmp_path, again, steps=80, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-65"))
    assert again.schedule is not None
    assert again.schedule.state_dict() == progressive.schedule.state_dict()


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


def test_a_run_that_goes_on_from_its_last_step_stays_as_it_is(tmp_path: Path) -> None:
    model, saving = converted_llama(), {"save_strategy": "steps", "save_steps": 7, "steps": 7}
    trainer_of(model, tmp_path, ProgressiveCallback(), **saving).train()
    resumed, callback = converted_llama(), ProgressiveCallback()
    trainer = trainer_of(resumed, tmp_path, callback, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert trainer.state.global_step == 7
    assert callback.gamma == 0
    expected, actual = state_of(model), state_of(resumed)
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


def test_a_model_that_was_not_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no PRepBN to fade; call convert_norms_"):
        trainer_of(stock_llama(), tmp_path, ProgressiveCallback()).train()


def test_padding_moves_no_statistics_in_training_and_recalibration(tmp_path: Path) -> None:
    def statistics(padding: int) -> tuple[Tensor, Tensor]:
        model = converted_llama()
        trainer = trainer_of(model, tmp_path, ProgressiveCallback(), steps=2)
        rows = [{"input_ids": row.clone(), "attention_mask": torch.ones_like(row), "labels": row} for row in TOKENS[:8]]
        for row in rows:
            row["input_ids"][6:], row["attention_mask"][6:] = padding, 0
            row["labels"] = row["labels"].masked_fill(row["attention_mask"] == 0, -100)
        trainer.train_dataset = rows
        trainer.train()
        norm = next(iter(repbn_modules(model).values()))
        trained = norm.running_mean.clone()
        sf.recalibrate_(model, trainer.get_train_dataloader())
        assert not torch.equal(norm.running_mean, trained)
        return trained, norm.running_mean

    for one, other in zip(statistics(padding=3), statistics(padding=7), strict=True):
        assert_close(one, other, EXACT)


class Loss(TrainerCallback):
    """Says that earlier models are better."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_score"] = float(state.global_step)


def best_of(tmp_path: Path, *callbacks: TrainerCallback, **changes: Any) -> tuple[LlamaForCausalLM, Trainer]:
    model = converted_llama()
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": False}
    callback = ProgressiveCallback(fade=changes.pop("fade", 0.6))
    trainer = trainer_of(model, tmp_path, callback, Loss(), *callbacks, **saving, **best, **changes)
    trainer.train()
    return model, trainer


def test_the_best_model_is_one_without_the_old_norm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, trainer = best_of(tmp_path)
    assert trainer.state.best_global_step == 6  # the first at gamma 0
    assert {float(norm.gamma) for norm in prepbn_modules(model).values()} == {0}
    assert "gamma" not in caplog.text


def test_no_best_model_is_better_than_one_that_has_not_faded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, trainer = best_of(tmp_path, StopAt(8), fade=1.0)
    assert trainer.state.best_model_checkpoint is None
    assert [float(norm.gamma) for norm in prepbn_modules(model).values()] == pytest.approx([0.2] * 5)
    assert "no checkpoint was evaluated at gamma 0" in caplog.text


def test_weights_of_an_earlier_step_at_the_end_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class GiveBack(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                for norm in prepbn_modules(model).values():
                    norm.gamma.fill_(0.75)

    trainer_of(converted_llama(), tmp_path, ProgressiveCallback(), GiveBack()).train()
    assert "training ended with gamma 0, but the model was given back gamma 0.75" in caplog.text


def test_a_second_training_goes_on_without_the_old_norm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = converted_llama()
    trainer_of(model, tmp_path, ProgressiveCallback()).train()
    trainer = trainer_of(model, tmp_path, ProgressiveCallback(), steps=2)
    trainer.train()
    assert {row["gamma"] for row in trainer.state.log_history} == {0}
    assert {float(norm.gamma) for norm in prepbn_modules(model).values()} == {0}
    assert "the schedule goes on from its gamma of 0" in caplog.text


def test_the_callback_is_copied_and_pickled_after_training(tmp_path: Path) -> None:
    callback = ProgressiveCallback(fade=0.5)
    trainer_of(converted_llama(), tmp_path, callback, steps=2).train()
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (other.fade, other.gamma) == (0.5, 0)


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


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 48, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
UNNAMED_NORMS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=1, n_head=2)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=16, n_layer=1, n_head=2)),
    "clip": lambda: CLIPModel(
        CLIPConfig(text_config=TEXT, vision_config={**SMALL, "image_size": 8, "patch_size": 4}, projection_dim=8)
    ),
}


@pytest.mark.parametrize("progressive", [True, False], ids=["prepbn", "repbn"])
@pytest.mark.parametrize("build", UNNAMED_NORMS.values(), ids=UNNAMED_NORMS.keys())
def test_a_plain_trainer_decays_no_parameter_of_the_norms(
    tmp_path: Path, build: Callable[[], PreTrainedModel], progressive: bool
) -> None:
    model = build()
    sf.convert_norms_(model, norm="prepbn" if progressive else "repbn")
    trainer = trainer_of(model, tmp_path, weight_decay=0.1)
    decay, spared = trainer.create_optimizer().param_groups
    assert (decay["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    own = {id(parameter) for parameter in sf.norm_parameters(model).values()}
    assert not own & {id(parameter) for parameter in decay["params"]}
    assert own <= {id(parameter) for parameter in spared["params"]}
    assert decay["params"]


def test_an_optimizer_of_the_callers_that_decays_norms_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = converted_llama()
    trainer = trainer_of(model, tmp_path, ProgressiveCallback(), steps=2)
    trainer.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    trainer.train()
    assert "the optimizer decays 20 parameters of the norms (first: model.layers.0.input_layernorm" in caplog.text
    caplog.clear()
    trainer_of(converted_llama(), tmp_path, ProgressiveCallback(), steps=2, weight_decay=0.1).train()
    assert "decays" not in caplog.text


def statistics_of(model: PreTrainedModel, forward: Callable[[PreTrainedModel], Any]) -> dict[str, Tensor]:
    """Running means after one forward of a copy in training, its padding hooked as the callback does it."""
    made = copy.deepcopy(model).train()
    keep_padding_out_everywhere_(made)
    keep_padding_out_everywhere_(made)  # once is enough
    forward(made)
    return {name: norm.running_mean.clone() for name, norm in repbn_modules(made).items()}


def assert_unmoved_by(model: PreTrainedModel, first: Any, second: Any) -> None:
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0)
        norm.rep.momentum = None
    one, other = statistics_of(model, first), statistics_of(model, second)
    for name, mean in one.items():
        assert_close(mean, other[name], FLOAT32)
        assert mean.any(), name


def masked(length: int) -> Tensor:
    """Two texts of ``length`` tokens, the second of which ends two before."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def test_an_embedding_of_tokens_follows_the_mask_of_the_model_around_it() -> None:
    model = bert()
    sf.convert_norms_(model)
    mask = masked(5)

    def forward(filler: int) -> Callable[[PreTrainedModel], Any]:
        tokens = torch.where(mask.bool(), TOKENS[:2, :5], filler)
        return lambda made: made(input_ids=tokens, attention_mask=mask)

    assert_unmoved_by(model, forward(3), forward(5))


@pytest.mark.parametrize(("encoder_length", "decoder_length"), [(7, 5), (6, 6)], ids=["lengths differ", "same length"])
def test_encoder_and_decoder_each_have_their_own_mask(encoder_length: int, decoder_length: int) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=48, decoder_start_token_id=0, **sizes))
    sf.convert_norms_(model)

    def forward(filler: int, decoder_mask: bool = True) -> Callable[[PreTrainedModel], Any]:
        mask, decoder = masked(encoder_length), masked(decoder_length).flip(0)
        batch = {"input_ids": torch.where(mask.bool(), TOKENS[:2, :encoder_length], filler), "attention_mask": mask}
        batch["decoder_input_ids"] = torch.where(
            decoder.bool() if decoder_mask else decoder >= 0, TOKENS[2:4, :decoder_length], filler
        )
        return lambda made: made(**batch, **({"decoder_attention_mask": decoder} if decoder_mask else {}))

    assert_unmoved_by(model, forward(3), forward(5))
    assert_unmoved_by(model, forward(3, decoder_mask=False), forward(5, decoder_mask=False))


@pytest.mark.parametrize("text_length", [5, 7], ids=["as long as the image", "longer"])
def test_the_mask_of_the_text_leaves_the_images_alone(text_length: int) -> None:
    model = UNNAMED_NORMS["clip"]()
    sf.convert_norms_(model)
    images, mask = torch.randn(2, 3, 8, 8), masked(text_length)

    def forward(filler: int, images: Tensor = images) -> Callable[[PreTrainedModel], Any]:
        ids = torch.where(mask.bool(), TOKENS[:2, :text_length], filler)
        return lambda made: made(input_ids=ids, pixel_values=images, attention_mask=mask)

    assert_unmoved_by(model, forward(3), forward(5))
    vision = {name for name in repbn_modules(model) if name.startswith("vision_model")}
    moved = statistics_of(model, forward(3))
    whole = statistics_of(model, lambda made: made.vision_model(images))
    for name in vision:
        assert_close(moved[name], whole[name], FLOAT32)  # every patch counts


def test_norms_over_heads_keep_padding_out() -> None:
    sizes = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 48}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    assert any("q_norm" in name for name in sf.convert_norms_(model))
    mask = masked(6)

    def forward(filler: int) -> Callable[[PreTrainedModel], Any]:
        return lambda made: made(torch.where(mask.bool(), TOKENS[:2, :6], filler), attention_mask=mask)

    assert_unmoved_by(model, forward(3), forward(5))
