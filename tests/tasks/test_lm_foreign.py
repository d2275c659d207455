"""Somebody else's model: converted or fused, its folder gives back what was saved, and nothing reads it wrongly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import slabformer as sf
from language_models import somebody_elses, tokens
from slabformer.models.llama import SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.language.folders import load_mapped, load_model_folder, save_model_folder
from slabformer.tasks.language.foreign import FUSED_WEIGHTS, is_foreign, note_norms_
from slabformer.tasks.language.fusing import LogitsOf, fuse_language_model
from tolerances import EXACT, FLOAT32, assert_close

#: architecture and what makes it special: biases, ties, norms over heads, norms behind branches
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "tie_word_embeddings": True}),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return LogitsOf(model)(tokens())


def greedy(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(tokens(1, 5), max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["converted", "fused"])
def test_reading_in_bfloat16_leaves_rotary_frequencies_in_float32(
    architecture: str, is_fused: bool, tmp_path: Path
) -> None:
    model = somebody_elses(architecture)
    save_model_folder(fuse_language_model(model)[0] if is_fused else model, None, tmp_path)
    loaded = load_model_folder(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters() if parameter.ndim > 1} == {torch.bfloat16}
    assert loaded.model.rotary_emb.inv_freq.dtype is torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists the files that a process maps")
def test_a_converted_folder_is_mapped_and_not_copied(tmp_path: Path) -> None:
    model = somebody_elses("qwen2", tie_word_embeddings=True)
    save_model_folder(model, None, tmp_path)
    loaded = load_mapped(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        loaded.model.embed_tokens.weight.zero_()  # a mapped page is copied when it is written to
    assert_close(logits(load_mapped(tmp_path)), logits(model), EXACT)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("qwen3", "gemma2"))) for name in MODELS]
)
def test_converted_and_fused_folders_give_back_the_model(name: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[name]
    model = somebody_elses(architecture, **changes)
    note_norms_(model)
    model.save_pretrained(tmp_path / "converted")  # as anybody's Trainer does
    loaded = load_model_folder(tmp_path / "converted")
    assert {norm.phase for norm in prepbn_modules(loaded).values()} == {"done"}
    assert_close(logits(loaded), logits(model), EXACT)
    fused, report = fuse_language_model(loaded, untie=True)
    assert report.num_kept == 0
    assert_close(logits(fused), logits(model), FLOAT32)
    save_model_folder(fused, None, tmp_path / "fused")
    saved = load_model_folder(tmp_path / "fused")
    assert_close(logits(saved), logits(fused), EXACT)
    assert_close(greedy(saved), greedy(model), EXACT)


def test_a_fused_llama_is_ours_and_transformers_reads_it(tmp_path: Path) -> None:
    fused, _ = fuse_language_model(somebody_elses("llama", attention_bias=True))
    save_model_folder(fused, None, tmp_path)
    assert not is_foreign(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SlabLlamaForCausalLM)
    assert_close(logits(loaded.eval()), logits(fused), EXACT)


def test_what_transformers_cannot_build_it_does_not_load_wrongly(tmp_path: Path) -> None:
    fused, _ = fuse_language_model(somebody_elses("mistral"))
    save_model_folder(fused, None, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [FUSED_WEIGHTS]
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_written_over_holds_one_model(tmp_path: Path) -> None:
    converted = somebody_elses("mistral")
    for model in (converted, fuse_language_model(converted)[0], converted):
        save_model_folder(model, None, tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
        assert_close(logits(load_model_folder(tmp_path)), logits(model), EXACT)


def test_shards_and_half_precision_are_read(tmp_path: Path) -> None:
    model = somebody_elses("llama")
    note_norms_(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_close(logits(load_model_folder(tmp_path)), logits(model), EXACT)
    half = load_model_folder(tmp_path, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for norm, expected in zip(repbn_modules(half).values(), repbn_modules(model).values(), strict=True):
        assert_close(norm.running_mean, expected.running_mean, EXACT)
    assert_close(logits(half).float(), logits(model), 0.1)  # eight bits of mantissa through two blocks


def test_norms_without_a_schedule_are_noted_too(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(somebody_elses("llama").config).eval()
    sf.convert_norms_(model, norm="repbn", momentum=None)
    sf.testing.randomize_norms_(model, 0)
    save_model_folder(model, None, tmp_path)
    loaded = load_model_folder(tmp_path)
    assert not prepbn_modules(loaded)
    assert_close(logits(loaded), logits(model), EXACT)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_damage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing")


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.rep.eta"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_depth(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, r"no model\.safetensors beside its configuration"),
        (with_damage, "are damaged"),
        (without_a_tensor, r"do not fit: 1 tensors missing \(first: model\.norm\.rep\.eta\)"),
        (of_another_depth, r"has no norm 'model\.layers\.1\.input_layernorm' to convert"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_folder_is_refused_in_words(damage: Any, message: str, tmp_path: Path) -> None:
    save_model_folder(somebody_elses("llama"), None, tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model_folder(tmp_path)
