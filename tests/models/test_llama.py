"""LLaMA with PRepBN: the published logits, transformers' own machinery, statistics that see real tokens only."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaModel

import slabformer as sf
from reference_files import description, published_state, reference
from slabformer._norm_names import norm_names
from slabformer.bench.decoding import cache_argument
from slabformer.models.llama import (
    SlabLlamaConfig,
    SlabLlamaForCausalLM,
    SlabLlamaForSequenceClassification,
    SlabLlamaModel,
)
from slabformer.models.weights.official import load_published, to_published
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.nn.norms import norm_types
from slabformer.surgery.fuse import Reason
from slabformer.tasks.conversion import count_norms
from slabformer.testing import randomize_norms_
from tolerances import EXACT, FLOAT32, assert_close

GOLDEN = "llama_prepbn_tiny"
TOKENS = reference(GOLDEN)["tokens"]
MASK = reference(GOLDEN)["attention_mask"]


def model(**changes: Any) -> SlabLlamaForCausalLM:
    torch.manual_seed(0)
    return SlabLlamaForCausalLM(SlabLlamaConfig(**(description(GOLDEN)["config"] | changes)))


def published(**changes: Any) -> SlabLlamaForCausalLM:
    made = model(**changes).eval()
    load_published(made, published_state(GOLDEN))
    return made


def fading(**changes: Any) -> SlabLlamaForCausalLM:
    made = model(norm_start="ones", **changes).train()
    for norm in prepbn_modules(made).values():
        norm.set_gamma(0.5)
    return made


def logits_of(made: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return made(**inputs).logits


@pytest.mark.parametrize("norm", norm_names())
def test_any_norm_of_the_table_trains_is_saved_and_folds(norm: str, tmp_path: Path) -> None:
    made, row = model(norm=norm, norm_start="ones"), norm_types()[norm]
    assert count_norms(made) == {row.title: 2 * 3 + 1}
    made(input_ids=TOKENS, attention_mask=MASK, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    for fading in prepbn_modules(made).values():
        fading.set_gamma(0)
    randomize_norms_(made).eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits_of(again, input_ids=TOKENS), logits_of(made, input_ids=TOKENS), EXACT)
    if row.scale_shift is None:
        with pytest.raises(ValueError, match=f"to fuse in {type(made).__name__}"):
            sf.fuse(made, (), {"input_ids": TOKENS})
        return
    _, report = sf.fuse(made, (), {"input_ids": TOKENS})
    assert report.num_folded == 2 * 3 + 1


def test_a_norm_that_there_is_not_is_answered_by_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"norm must be one of prepbn, .*dyt.*, folded, got 'rmsnrm'; did you mean 'rmsnorm'"
    ):
        SlabLlamaConfig(norm="rmsnrm")
    with pytest.raises(ValueError, match="eta is for norms with a skip"):
        SlabLlamaConfig(norm="rmsnorm", eta=0.0)


def test_plain_batchnorm_starts_as_it_always_does_and_eta_as_it_is_given() -> None:
    assert all(norm.weight.eq(1).all() for norm in repbn_modules(model(norm="batchnorm")).values())
    assert all(norm.eta.item() == 0.25 for norm in repbn_modules(model(eta=0.25)).values())


# --- published files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["prepbn", "repbn"])
@pytest.mark.parametrize(("output", "mask"), [("logits", None), ("logits_masked", MASK)], ids=["plain", "masked"])
def test_logits_equal_the_published_ones(norm: str, output: str, mask: Tensor | None) -> None:
    expected = reference(GOLDEN)[output]
    actual = logits_of(published(norm=norm), input_ids=TOKENS, attention_mask=mask)
    assert (actual - expected).abs().max() <= 1e-5 * expected.std()


def test_fused_logits_equal_the_published_ones_and_no_norm_is_left() -> None:
    made, expected = published(), reference(GOLDEN)["merged_logits"]
    fused, report = sf.fuse(made, (), {"input_ids": TOKENS})
    assert (report.num_folded, report.num_kept) == (2 * 3 + 1, 0)
    assert not repbn_modules(fused)
    assert (logits_of(fused, input_ids=TOKENS) - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
def test_greedy_continuation_is_the_published_one(fuse: bool) -> None:
    made: Any = published()
    if fuse:
        made, _ = sf.fuse(made, (), {"input_ids": TOKENS})
    continued = made.generate(TOKENS[:1, :6], max_length=20, do_sample=False, eos_token_id=None)
    assert_close(continued, reference(GOLDEN)["greedy"], EXACT)


def test_published_files_come_out_as_they_went_in() -> None:
    out, expected = to_published(published()), published_state(GOLDEN)
    assert out.keys() == expected.keys()
    for name, value in out.items():
        assert value.dtype == expected[name].dtype, name
        if not name.endswith((".inv_freq", ".total_step")):
            assert_close(value, expected[name], EXACT)
    assert {out[name].item() for name in out if name.endswith(".total_step")} == {1}


def test_a_file_of_another_size_is_refused_and_changes_nothing() -> None:
    made = model(hidden_size=32)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint does not fit SlabLlamaForCausalLM: .* of another shape"):
        load_published(made, published_state(GOLDEN))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize(("norm", "millions"), [("rmsnorm", 367.56), ("prepbn", 367.64)])
def test_the_350m_model_has_the_published_number_of_parameters(norm: Any, millions: float) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 8}
    with torch.device("meta"):
        made = SlabLlamaForCausalLM(SlabLlamaConfig(**sizes, norm=norm))
    assert round(sum(p.numel() for p in made.parameters()) / 1e6, 2) == millions


# --- transformers' machinery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.25], ids=["done", "fading"])
def test_a_folder_restores_the_model_and_its_phase(tmp_path: Path, gamma: float) -> None:
    made = published()
    for norm in prepbn_modules(made).values():
        norm.set_gamma(gamma)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SlabLlamaForCausalLM
    assert {norm.phase for norm in prepbn_modules(loaded).values()} == {"done" if gamma == 0 else "fading"}
    with sf.blended(made), sf.blended(loaded):
        assert_close(logits_of(loaded, input_ids=TOKENS), logits_of(made, input_ids=TOKENS), EXACT)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "SlabLlamaModel"


def test_a_fused_folder_loads_without_norms(tmp_path: Path) -> None:
    fused, _ = sf.fuse(published(), (), {"input_ids": TOKENS})
    assert isinstance(fused, SlabLlamaForCausalLM)
    fused.config.norm = "folded"
    fused.save_pretrained(tmp_path)
    loaded, info = SlabLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(logits_of(loaded, input_ids=TOKENS), logits_of(fused, input_ids=TOKENS), EXACT)


def test_a_cache_changes_no_logits() -> None:
    made = published()
    whole = logits_of(made, input_ids=TOKENS)
    with torch.no_grad():
        first = made(TOKENS[:, :20], use_cache=True)
        name = cache_argument(made)
        rest = made(TOKENS[:, 20:], use_cache=True, **{name: first[name]})
    assert_close(torch.cat([first.logits, rest.logits], 1), whole, FLOAT32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_can_be_chosen(attention: str) -> None:
    made = published(attn_implementation=attention)
    assert made.config._attn_implementation == attention
    assert_close(logits_of(made, input_ids=TOKENS), reference(GOLDEN)["logits"], FLOAT32)


def test_sequences_are_classified_and_bfloat16_is_finite() -> None:
    made = AutoModelForSequenceClassification.from_config(
        SlabLlamaConfig(**description(GOLDEN)["config"], num_labels=3)
    )
    assert type(made) is SlabLlamaForSequenceClassification
    assert logits_of(made.eval(), input_ids=TOKENS).shape == (2, 3)
    half = logits_of(published().bfloat16(), input_ids=TOKENS)
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_and_gamma_are_loaded_in_float32_whatever_the_weights_are(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    made = sf.testing.randomize_norms_(model())
    for norm in prepbn_modules(made).values():
        norm.set_gamma(0.3)
        norm.rep.running_var += 70_000  # beyond float16, and more digits than bfloat16 has
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for norm, expected in zip(prepbn_modules(loaded).values(), prepbn_modules(made).values(), strict=True):
        assert norm.rep.weight.dtype == dtype
        assert_close(norm.rep.running_mean, expected.rep.running_mean, EXACT)
        assert_close(norm.rep.running_var, expected.rep.running_var, EXACT)
        assert_close(norm.gamma, expected.gamma, EXACT)


@pytest.mark.parametrize(("start", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_norms_start_as_asked(start: Any, value: float) -> None:
    for norm in prepbn_modules(model(norm_start=start)).values():
        assert {norm.rep.eta.item(), *norm.rep.weight.tolist()} == {value}
        assert not norm.rep.bias.any()
        assert (norm.phase, norm.rep.eps) == ("warm", 1e-6)
        assert {*norm.norm.weight.tolist()} == {1.0}


# --- statistics ----------------------------------------------------------------------------------------------------


def statistics(made: nn.Module) -> list[Tensor]:
    return [norm.running_mean.clone() for norm in repbn_modules(made).values()]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_padding_moves_no_statistics(checkpointing: bool) -> None:
    """Padded tokens are others, their statistics and the gradients of real tokens are not; each batch counts once."""
    results = []
    for filler in (3, 5):
        made = fading(use_cache=False)
        if checkpointing:
            getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)()  # renamed in 5.x
        tokens = torch.where(MASK.bool(), TOKENS, filler)
        labels = torch.where(MASK.bool(), TOKENS, -100)
        made(tokens, attention_mask=MASK, labels=labels).loss.backward()
        assert {int(norm.num_batches_tracked) for norm in repbn_modules(made).values()} == {1}
        results.append((statistics(made), made.lm_head.weight.grad))
    (one, gradient), (other, same) = results
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, FLOAT32)
        assert a.abs().sum() > 0
    assert_close(same, gradient, FLOAT32)


def test_a_batch_without_padding_forgets_the_mask_of_the_last_one() -> None:
    made = fading()
    made(TOKENS, attention_mask=MASK)
    made(TOKENS[:, :5])
    assert all(norm.token_mask is None for norm in repbn_modules(made).values())


def test_recalibration_sees_real_tokens_only() -> None:
    means = []
    for filler in (3, 5):
        made = published()
        tokens = torch.where(MASK.bool(), TOKENS, filler)
        sf.recalibrate_(made, [{"input_ids": tokens, "attention_mask": MASK}])
        means.append(statistics(made))
    for a, b in zip(*means, strict=True):
        assert_close(a, b, FLOAT32)


def test_a_tied_head_keeps_the_last_norm() -> None:
    made = model(tie_word_embeddings=True, norm_start="ones").eval()
    sf.testing.randomize_norms_(made)
    for norm in prepbn_modules(made).values():
        norm.set_gamma(0.0)
    _, report = sf.fuse(made, (), {"input_ids": TOKENS})
    assert [(o.name, Reason.TIED in o.codes) for o in report if o.action == "kept"] == [("model.norm", True)]


def test_the_forward_says_which_inputs_it_takes() -> None:
    assert inspect.signature(SlabLlamaModel.forward) == inspect.signature(LlamaModel.forward)
