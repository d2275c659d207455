"""A language model's run end to end: its folder, its figures, its text; the recipes for one."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import slabformer as sf
from csv_files import csv_rows
from language_models import SIZES, sentences, streamed, tiny_config, tokens
from slabformer.cli.lm.train import parser, to_train_config
from slabformer.models.llama import SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.language.build import config_of_model
from slabformer.tasks.language.config import ModelConfig
from slabformer.tasks.language.packing import BlockStream, collate
from slabformer.tasks.language.text import read_text
from slabformer.tasks.language.train import build_model, train, training_arguments
from slabformer.tasks.language.trainer import LanguageTrainer
from tolerances import EXACT, assert_close


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
    steps, metrics = csv_rows(result.output / "steps.csv"), csv_rows(result.output / "metrics.csv")
    assert [(row["step"], float(row["gamma"])) for row in steps] == [("5", 0.375), ("10", 0)]
    assert [bool(row["blend_perplexity"]) for row in metrics] == [True, False]
    assert float(metrics[1]["perplexity"]) == pytest.approx(result.summary["perplexity_before_recalibration"], rel=1e-6)


@pytest.mark.parametrize("norm", ["rmsnorm", "repbn"])
def test_other_norms_train_without_a_schedule(norm: Any, tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path / "run", model=ModelConfig(**SIZES, context=16, norm=norm)))
    assert "gamma" not in result.summary
    assert ("perplexity_before_recalibration" in result.summary) == (norm == "repbn")
    assert result.summary["perplexity"] < 300


def test_streamed_text_trains(tmp_path: Path) -> None:
    tiny_config(tmp_path / "run")  # writes the text
    summary = train(streamed(tmp_path / "run")).summary
    assert summary["data"]["held_out_documents"] == 10
    assert summary["perplexity"] < 300
    assert "bigram_perplexity" not in summary


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
