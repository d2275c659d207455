"""An embedding and a head that fusing took apart stay apart, whatever transformers is asked to do with them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import slabformer as sf
from slabformer.models.llama import SlabLlamaConfig, SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.language.folders import load_model_folder, save_model_folder
from slabformer.tasks.language.fusing import fuse_language_model
from slabformer.testing import randomize_norms_
from tolerances import EXACT, FLOAT32, assert_close

V = 48
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
#: all below V - 5, so that a smaller embedding still holds them
TOKENS = torch.randint(0, V - 5, (2, 9), generator=torch.Generator().manual_seed(1))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def llava() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **sizes)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, tie_word_embeddings=True, image_token_id=1)
    )


def t5() -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "num_decoder_layers": 1}
    config = T5Config(vocab_size=V, decoder_start_token_id=0, tie_word_embeddings=True, dropout_rate=0.0, **sizes)
    return T5ForConditionalGeneration(config)


def inputs_of(make: Callable[[], PreTrainedModel]) -> dict[str, Any]:
    return {"input_ids": TOKENS, "use_cache": False} | ({"decoder_input_ids": TOKENS[:, :4]} if make is t5 else {})


@functools.cache
def fused_once(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A fused model that computes what the model did."""
    torch.manual_seed(0)
    model = make()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    sf.convert_norms_(model)
    randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0)
    model.eval()
    fused, _ = sf.fuse(model, (), inputs_of(make), untie=True)
    assert isinstance(fused, PreTrainedModel)
    assert fused.get_output_embeddings().weight is not fused.get_input_embeddings().weight
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        assert_close(fused(**inputs_of(make)).logits, model(**inputs_of(make)).logits, FLOAT32)
    return fused


def untied(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, Callable[[nn.Module], Tensor]]:
    """A fused model, to change, and its logits as a function."""

    def logits(candidate: nn.Module) -> Tensor:
        with torch.no_grad():
            return candidate(**inputs_of(make)).logits

    return copy.deepcopy(fused_once(make)), logits


each_model = pytest.mark.parametrize(
    "make", [llama, llava, t5], ids=["llama", "nested_configuration", "encoder_decoder"]
)


@each_model
def test_configurations_say_that_the_head_is_on_its_own(make: Callable[[], PreTrainedModel]) -> None:
    fused, _ = untied(make)
    config: Any = fused.config
    assert not config.tie_word_embeddings
    assert not config.get_text_config(decoder=True).tie_word_embeddings
    assert not any("lm_head" in name for name in fused.all_tied_weights_keys)


@each_model
def test_tying_again_changes_nothing(make: Callable[[], PreTrainedModel]) -> None:
    fused, logits = untied(make)
    expected = logits(fused)
    fused.tie_weights()
    fused.tie_weights(recompute_mapping=False)
    assert_close(logits(fused), expected, EXACT)


@each_model
@pytest.mark.parametrize("size", [V + 5, V - 5])
def test_a_new_number_of_tokens_keeps_the_logits_of_the_old_ones(
    make: Callable[[], PreTrainedModel], size: int
) -> None:
    fused, logits = untied(make)
    expected = logits(fused)
    fused.resize_token_embeddings(size, mean_resizing=False)
    both = min(size, V)
    assert_close(logits(fused)[..., :both], expected[..., :both], FLOAT32)


def test_what_stays_tied_is_left_alone() -> None:
    fused, _ = untied(t5)
    assert fused.encoder.embed_tokens.weight is fused.shared.weight
    model = llama()
    sf.convert_norms_(model)
    fused, _ = sf.fuse(model.eval(), (), {"input_ids": TOKENS, "use_cache": False}, allow_gamma=True)
    assert fused.config.tie_word_embeddings
    assert fused.get_output_embeddings().weight is fused.get_input_embeddings().weight


def test_files_of_untied_models_are_read_untied(tmp_path: Path) -> None:
    fused, logits = untied(llama)
    save_model_folder(fused, None, tmp_path / "folder")
    sf.save_fused(fused, tmp_path / "fused.safetensors")
    for loaded in (load_model_folder(tmp_path / "folder"), sf.load_fused(llama(), tmp_path / "fused.safetensors")):
        loaded.eval()
        assert_close(logits(loaded), logits(fused), FLOAT32)
        loaded.tie_weights()
        assert_close(logits(loaded), logits(fused), FLOAT32)
        assert not loaded.config.tie_word_embeddings


def test_a_fused_model_of_ours_survives_transformers_own_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SlabLlamaForCausalLM(SlabLlamaConfig(**SIZES))
    randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0)
    fused, report = fuse_language_model(model.eval(), untie=True)
    assert report.num_kept == 0
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        assert_close(loaded(input_ids=TOKENS, use_cache=False).logits, expected, FLOAT32)
        loaded.resize_token_embeddings(V + 3)
        assert_close(loaded(input_ids=TOKENS, use_cache=False).logits[..., :V], expected, FLOAT32)
