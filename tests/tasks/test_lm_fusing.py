"""Norms gone from language models and from the published folder, with the text they write unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from language_models import tokens, trained_looking
from reference_files import description, published_state, reference
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.language.callback import ProgressiveCallback
from slabformer.tasks.language.folders import load_model_folder, save_model_folder
from slabformer.tasks.language.fusing import (
    LogitsOf,
    check_finished,
    fuse_language_model,
    steps_missing_in,
    what_stays,
)
from slabformer.tasks.language.generate import check_prompt, sampling
from slabformer.tasks.language.published import import_published
from tolerances import EXACT, FLOAT32, assert_close

GOLDEN = "llama_prepbn_tiny"
PROMPTS = 20


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return LogitsOf(model)(ids)


def published_folder(folder: Path, **changes: Any) -> Path:
    """What the hub holds: configuration with its authors' classes, weights, and something nobody should load."""
    folder.mkdir(exist_ok=True)
    config = {**description(GOLDEN)["config"], "architectures": ["Theirs"], "auto_map": {"AutoModel": "theirs.Model"}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    torch.save(published_state(GOLDEN), folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"pickled")
    return folder


# --- fusing --------------------------------------------------------------------------------------------------------


def test_greedy_texts_before_and_after_agree_token_for_token() -> None:
    model = trained_looking()
    fused, report = fuse_language_model(model)
    assert (report.num_folded, report.num_kept) == (5, 0)
    assert not repbn_modules(fused)
    for seed in range(PROMPTS):
        prompt = tokens(1, 3 + seed % 7, seed)
        before, after = (
            made.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
            for made in (model, fused)
        )
        assert_close(after, before, EXACT)


def test_a_fused_folder_is_read_back_by_transformers(tmp_path: Path) -> None:
    fused, _ = fuse_language_model(trained_looking())
    save_model_folder(fused, None, tmp_path)
    assert not list(tmp_path.glob(".*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.norm == "folded"
    assert_close(logits(loaded, tokens()), logits(fused, tokens()), EXACT)


def test_a_tied_head_is_untied_only_when_asked(tmp_path: Path) -> None:
    model = trained_looking(tie_word_embeddings=True)
    for untie in (False, True):
        fused, report = fuse_language_model(model, untie=untie)
        assert report.num_kept == (not untie)
        assert fused.config.tie_word_embeddings is not untie
        assert_close(logits(fused, tokens()), logits(model, tokens()), FLOAT32)
        stays = what_stays(model, report)
        assert ("model.norm stays as a scale and shift" in stays and "--untie gives the head" in stays) is not untie
        save_model_folder(fused, None, tmp_path)
        assert_close(logits(load_model_folder(tmp_path), tokens()), logits(fused, tokens()), EXACT)
    assert model.config.tie_word_embeddings


def test_an_unfinished_schedule_is_refused_with_the_steps_that_miss(tmp_path: Path) -> None:
    model = trained_looking()
    check_finished(model, tmp_path)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.25)
    with pytest.raises(ValueError, match=r"still holds its RMSNorms \(gamma is 0\.25\); train it to the end"):
        check_finished(model, tmp_path)
    checkpoint = tmp_path / "checkpoint-60"
    checkpoint.mkdir()
    schedule = ProgressiveCallback(warmup=0.1, fade=0.7).state()
    state = {"global_step": 60, "max_steps": 100, "stateful_callbacks": {"ProgressiveCallback": schedule}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert steps_missing_in(checkpoint) == steps_missing_in(tmp_path) == 20
    with pytest.raises(ValueError, match="20 more steps of its run would finish its schedule"):
        check_finished(model, checkpoint)


# --- folders -------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path: Path) -> None:
    save_model_folder(trained_looking(), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"do not fit its configuration: .* tensors missing"):
        load_model_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no language model at"):
        load_model_folder(tmp_path / "nowhere")


def test_the_published_folder_gives_the_published_logits(tmp_path: Path) -> None:
    model, tokenizer = import_published(published_folder(tmp_path))
    assert tokenizer is None
    assert {norm.phase for norm in prepbn_modules(model).values()} == {"done"}
    expected = reference(GOLDEN)["logits"]
    difference = logits(model, reference(GOLDEN)["tokens"]) - expected
    assert difference.abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: published_folder(folder, hidden_size=32), "of another shape"),
        (lambda folder: published_folder(folder, num_hidden_layers=2), "unexpected"),
        (lambda folder: (folder / "pytorch_model.bin").unlink(), r"no pytorch_model\.bin in"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n."), "cannot read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "lacks vocab_size"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    ],
    ids=["size", "depth", "no-weights", "pickle", "no-sizes", "no-json"],
)
def test_a_damaged_published_folder_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    damage(published_folder(tmp_path / "folder"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        import_published(tmp_path / "folder")


# --- settings of generate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_k": -2}, "top_k must be at least 0, got -2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling(**settings)  # type: ignore[arg-type]


def test_a_text_longer_than_the_context_is_refused() -> None:
    model = trained_looking()
    check_prompt(model, 60, 4)
    with pytest.raises(ValueError, match="prompt of 60 tokens and 5 new ones do not fit the context of 64"):
        check_prompt(model, 60, 5)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        check_prompt(model, 3, 0)
