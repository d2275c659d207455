"""A run end to end: its folder, its resumption, and mistakes in one line."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import slabformer as sf
from language_models import SIZES, sentences, tiny_config, tokens
from slabformer.cli.lm.train import parser, to_train_config
from slabformer.models.llama import SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.engine.config import FadeConfig, RecalibrateConfig
from slabformer.tasks.engine.nonfinite import NonFiniteError
from slabformer.tasks.engine.signals import StoppedError
from slabformer.tasks.language.build import config_of_model
from slabformer.tasks.language.config import ModelConfig, TrainConfig
from slabformer.tasks.language.corpus import DataConfig
from slabformer.tasks.language.packing import BlockStream, collate
from slabformer.tasks.language.text import read_text
from slabformer.tasks.language.tokens import TokenizerConfig
from slabformer.tasks.language.train import build_model, train, training_arguments
from slabformer.tasks.language.trainer import LanguageTrainer
from slabformer.tasks.language.watch import SignalCallback
from tolerances import EXACT, assert_close


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SIGTERM during ``step`` does."""
    original = SignalCallback.on_step_end

    def on_step_end(self: SignalCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.signals.received = 15 if state.global_step == step else 0
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(SignalCallback, "on_step_end", on_step_end)


def test_a_run_leaves_a_model_that_fuses_and_generates(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path / "run"))
    names = {path.name for path in result.output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "config.yaml", "summary.json"} <= names
    assert {"metrics.csv", "steps.csv", "checkpoint-5", "checkpoint-10"} <= names
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary == result.summary
    assert summary["gamma"] == 0
    assert len(summary["data"]["sha256"]) == 64
    assert summary["perplexity"] < 300
    model = AutoModelForCausalLM.from_pretrained(result.output).eval()
    prompt = AutoTokenizer.from_pretrained(result.output)("the norm", return_tensors="pt")
    fused, report = sf.fuse(model, (), {"input_ids": tokens(1, 9), "use_cache": False})
    assert (report.num_folded, report.num_kept) == (5, 0)
    continued = [made.generate(**prompt, max_new_tokens=6, do_sample=False) for made in (model, fused)]
    assert_close(continued[0], continued[1], EXACT)


def test_the_rows_show_gamma_fall_and_the_blend_while_there_is_one(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path / "run"))
    steps, metrics = rows(result.output / "steps.csv"), rows(result.output / "metrics.csv")
    assert [(row["step"], float(row["gamma"])) for row in steps] == [("5", 0.375), ("10", 0)]
    assert [bool(row["blend_perplexity"]) for row in metrics] == [True, False]
    assert float(metrics[1]["perplexity"]) == pytest.approx(result.summary["perplexity_before_recalibration"], rel=1e-6)


@pytest.mark.parametrize("norm", ["rmsnorm", "repbn"])
def test_other_norms_train_without_a_schedule(norm: Any, tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path / "run", model=ModelConfig(**SIZES, context=16, norm=norm)))
    assert "gamma" not in result.summary
    assert ("perplexity_before_recalibration" in result.summary) == (norm == "repbn")
    assert result.summary["perplexity"] < 300


def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"accumulate": 2, "save_every": 4, "eval_every": 4, "model": ModelConfig(**SIZES, context=8)}
    whole = train(tiny_config(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(StoppedError, match="stopped by SIGTERM after step 6"):
            train(tiny_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = train(tiny_config(tmp_path / "run", **changes))
    assert resumed.summary["resumed"]
    expected, actual = (load_file(result.output / "model.safetensors") for result in (whole, resumed))
    for name, value in expected.items():
        assert_close(actual[name], value, EXACT)
    assert rows(resumed.output / "metrics.csv") == rows(whole.output / "metrics.csv")
    assert "training ended" not in caplog.text


def test_a_finished_run_is_not_trained_again_and_another_one_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    first = train(config)
    again = train(config)
    assert again.already_finished
    assert again.summary == first.summary
    with pytest.raises(ValueError, match="holds another run: seed was 0, now 1"):
        train(replace(config, seed=1))
    with pytest.raises(ValueError, match="holds a run already"):
        train(replace(config, resume="never"))
    other = train(replace(config, seed=1, overwrite=True))
    assert other.summary["perplexity"] != first.summary["perplexity"]


def test_a_half_written_checkpoint_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path / "run", save_every=3)

    def die(self: Trainer, *args: Any) -> None:
        if self.state.global_step == 6:
            raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_scaler", die)
        with pytest.raises(OSError, match="no space left"):
            train(config)
    assert (tmp_path / "run" / "checkpoint-6").exists()
    assert train(config).summary["resumed"]
    assert [row["step"] for row in rows(tmp_path / "run" / "steps.csv")] == ["5", "10"]


def test_streamed_text_trains(tmp_path: Path) -> None:
    tiny_config(tmp_path / "run")  # writes the text
    summary = train(streamed(tmp_path / "run")).summary
    assert summary["data"]["held_out_documents"] == 10
    assert summary["perplexity"] < 300
    assert "bigram_perplexity" not in summary


def streamed(output: Path, **changes: Any) -> TrainConfig:
    return tiny_config(
        output,
        data=DataConfig(path=str(output.parent / "text.txt"), document="line", stream=True, validation=10),
        tokenizer=TokenizerConfig(vocab_size=300, documents=50),
        recalibrate=RecalibrateConfig(batches=2),
        **changes,
    )


def test_a_stream_that_was_stopped_in_a_later_epoch_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(sentences(30)))  # 20 to train on: two steps an epoch
    whole = train(streamed(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(StoppedError):
            train(streamed(tmp_path / "run"))
    monkeypatch.setattr("slabformer.tasks.language.text.train_tokenizer", None)  # the checkpoint has one
    resumed = train(streamed(tmp_path / "run"))
    expected, actual = (load_file(result.output / "model.safetensors") for result in (whole, resumed))
    for name, value in expected.items():
        assert_close(actual[name], value, EXACT)


def test_each_process_of_several_reads_its_own_share(tmp_path: Path) -> None:
    config = streamed(tmp_path / "run")
    tiny_config(tmp_path / "run")  # writes the text
    text, arguments = read_text(config), training_arguments(config)
    seen = []
    for rank in range(2):
        data = {"train_dataset": text.train, "eval_dataset": text.held_out, "data_collator": collate}
        trainer = LanguageTrainer(build_model(config, text), arguments, **data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(arguments), "process_index", rank)
            patch.setattr(type(arguments), "world_size", 2)
            seen.append([batch["input_ids"] for batch in trainer.training_batches(3)])
        assert isinstance(text.train, BlockStream)
        own = islice(text.train.share(rank, 2), 12)
        assert_close(torch.cat(seen[rank]), torch.stack([block["input_ids"] for block in own]), EXACT)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_recalibration_takes_the_population_of_the_training_blocks(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(train(config).output)
    before = {name: norm.running_mean.clone() for name, norm in repbn_modules(model).items()}
    train_blocks = read_text(config).train
    batch = {name: torch.stack([block[name] for block in train_blocks]) for name in ("input_ids", "position_ids")}
    sf.recalibrate_(model, [{**batch, "use_cache": False}])
    first = next(iter(before))
    assert_close(repbn_modules(model)[first].running_mean, before[first], 0.02)


# --- what goes wrong -----------------------------------------------------------------------------------------------


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


def test_a_document_longer_than_the_context_is_split(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join([" ".join(sentences(30)), *sentences(20, seed=1)]))
    summary = train(tiny_config(tmp_path / "run", steps=3)).summary
    assert summary["data"]["documents"] == 21


@pytest.mark.parametrize("recipe", ["llama_micro_prepbn", "llama_10m_prepbn", "llama_350m_prepbn"])
def test_a_recipe_is_read_and_its_model_can_be_built(recipe: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml"
    config = to_train_config(parser().parse_args(["--config", str(path)]))
    given = yaml.safe_load(path.read_text())
    assert config.steps == given["steps"]
    with torch.device("meta"):
        made = SlabLlamaForCausalLM(config_of_model(config.model, config.tokenizer.vocab_size))
    assert len(prepbn_modules(made)) == 2 * config.model.num_hidden_layers + 1


@pytest.mark.slow
def test_half_of_the_micro_recipe_beats_bigrams_by_a_fifth(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "llama_micro_prepbn.yaml"
    options = ["--config", str(recipe), "--steps", "300", "--output", str(tmp_path), "--device", "cpu"]
    summary = train(to_train_config(parser().parse_args(options))).summary
    assert summary["data"]["path"] == "pydoc"
    assert len(summary["data"]["sha256"]) == 64
    assert summary["perplexity"] <= 0.8 * summary["bigram_perplexity"]
