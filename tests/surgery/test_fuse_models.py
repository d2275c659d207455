"""Whole models of timm and transformers, converted, with random norms: how many fold, why the others stay."""

from collections import Counter
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from fusing import assert_same_outputs, fused, ready, tokens
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import FuseReport, Reason, fuse, load_fused, save_fused
from slabformer.surgery.verify import verify


def converted(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    convert_norms_(model)
    return ready(model, dtype)


def vision(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return converted(timm.create_model(name, num_classes=10, **options), dtype)


def images(height: int = 224, width: int = 224) -> Tensor:
    return tokens(1, 3, height, width)


def actions(report: FuseReport) -> Counter[str]:
    return Counter(outcome.action for outcome in report)


def reasons(report: FuseReport) -> set[Reason]:
    """Of each kept norm, why it did not fold forward."""
    return {outcome.codes[0] for outcome in report if outcome.action == "kept"}


# --- timm ----------------------------------------------------------------------------------------------------------

MODELS = {
    "vit_tiny_patch16_224": ({"forward": 25}, set()),
    "pvt_v2_b0": ({"forward": 26, "backward": 4}, set()),
    "swin_tiny_patch4_window7_224": ({"forward": 28, "backward": 1}, set()),
    "convnext_atto": ({"forward": 16, "backward": 1}, set()),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), MODELS.items(), ids=MODELS)
def test_timm_models_keep_their_outputs(name: str, expected: tuple[dict[str, int], set[Reason]]) -> None:
    _, report = fused(vision(name), images())
    assert (actions(report), reasons(report)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_timm_models_keep_their_outputs_in_float32(name: str) -> None:
    """Within 1e-5, or 4 times what float32 itself costs the unfused model (DESIGN.md, ground rules of measuring)."""
    model, x = vision(name, torch.float32), images()
    result, _ = fuse(model, x.float())
    verify(model, result, x.float(), rtol=max(1e-5, 4 * _own_error(model, x)))


def _own_error(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        single, double = model(x.float()).double(), model.double()(x)
    model.float()
    return ((single - double).abs().max() / double.square().mean().sqrt()).item()


@pytest.mark.slow
def test_a_swin_fused_at_224_is_right_where_its_windows_are_padded() -> None:
    model = vision("swin_tiny_patch4_window7_224", strict_img_size=False)
    result, _ = fused(model, images())
    assert_same_outputs(model, result, (images(256, 320),))


@pytest.mark.slow
def test_a_swin_of_fixed_size_folds_all_norms_and_refuses_padded_windows() -> None:
    model = vision("swin_tiny_patch4_window7_224", strict_img_size=False)
    result, report = fused(model, images(), fixed_size=True)
    assert actions(report) == {"forward": 28, "backward": 1}
    with pytest.raises(ValueError, match="for inputs of size 3x224x224, got 3x256x320"):
        result(images(256, 320))


@pytest.mark.slow
def test_a_vit_goes_through_a_file_into_a_fresh_layernorm_model(tmp_path: Any) -> None:
    result, _ = fused(vision("vit_tiny_patch16_224", img_size=64), images(64, 64))
    save_fused(result, tmp_path / "vit.safetensors")
    skeleton = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).eval().double()
    assert_same_outputs(result, load_fused(skeleton, tmp_path / "vit.safetensors"), (images(64, 64),))


@pytest.mark.gpu
def test_models_and_inputs_on_a_gpu_stay_there() -> None:
    model, x = vision("vit_tiny_patch16_224", img_size=64).cuda(), images(64, 64).cuda()
    result, report = fused(model, x)
    assert report.num_folded == 25
    assert {parameter.device.type for parameter in result.parameters()} == {"cuda"}


# --- transformers --------------------------------------------------------------------------------------------------

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([5, 6]), 0)
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def gpt2(tied: bool = True) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    config.tie_word_embeddings = tied
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8))


LANGUAGE = {
    # post-norm throughout: each norm hands its scale on along the residual, to the last
    "bert": (bert, {"forward": 3, "backward": 1, "kept": 1}, {Reason.MODEL_OUTPUT}),
    "gpt2": (gpt2, {"forward": 4, "kept": 1}, {Reason.TIED}),
    "gpt2-untied": (lambda: gpt2(tied=False), {"forward": 5}, set()),
    "llama": (llama, {"forward": 5}, set()),
    # the norms over each head of the queries and keys go into their projections
    "qwen3": (qwen3, {"forward": 5, "backward": 4}, set()),
}


@pytest.mark.parametrize(("build", "counts", "why"), LANGUAGE.values(), ids=LANGUAGE)
def test_transformers_models_keep_their_outputs(build: Any, counts: dict[str, int], why: set[Reason]) -> None:
    model = converted(build())
    use_cache = getattr(model.config, "use_cache", None)
    _, report = fused(model, (), {"input_ids": IDS, "attention_mask": MASK})
    assert (actions(report), reasons(report)) == (counts, why)
    assert getattr(model.config, "use_cache", None) == use_cache


def test_a_fused_language_model_generates_the_same_tokens() -> None:
    model = converted(llama())
    result, _ = fuse(model, (), {"input_ids": IDS})
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(result.generate(IDS, **options), model.generate(IDS, **options))
