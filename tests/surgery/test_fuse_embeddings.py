"""Norms behind tables of embeddings, alone and in whole models."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fusing import assert_same_outputs, codes, fused, net, norm, outcomes, ready, reason, tokens
from slabformer.surgery.audit import audit
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import Reason, fuse, load_fused, save_fused
from slabformer.surgery.fuse.tree.files import plain_
from tolerances import EXACT, assert_close

IDS = torch.tensor([[0, 1, 2, 4], [3, 3, 0, 1]])


def lookup(forward: Any, **others: nn.Module) -> nn.Module:
    children = {"embed": nn.Embedding(5, 6), "places": nn.Embedding(4, 6), "linear": nn.Linear(6, 6)}
    return net(lambda m, ids: forward(m, ids).tanh(), norm=norm(), **{**children, **others})


def positions(m: Any, ids: Tensor) -> Tensor:
    return m.places(torch.arange(ids.shape[1])[None])


FOLDS = {
    "alone": (lambda m, ids: m.norm(m.embed(ids)), ("embed",)),
    "times a number": (lambda m, ids: m.norm(m.embed(ids) * 6**0.5), ("embed",)),
    "and positions": (
        lambda m, ids: m.norm(F.dropout(m.embed(ids) + positions(m, ids), 0.1, False)),
        ("embed", "places"),
    ),
    "and rows of a table": (lambda m, ids: m.norm(m.embed(ids) + m.places.weight[: ids.shape[1]]), ("embed", "places")),
    "and a layer": (lambda m, ids: m.norm(m.embed(ids) + m.linear(m.other(ids))), ("embed", "linear")),
    # the table of coordinates has a part in the sum twice, so another table takes the shift
    "and coordinates": (
        lambda m, ids: m.norm(m.places(ids // 2) + m.places(ids // 3) + m.embed(ids)),
        ("embed", "places"),
    ),
    "side by side": (lambda m, ids: m.norm(torch.cat([m.embed(ids), m.other(ids)], 1)), ("embed", "other")),
    "looked up twice": (lambda m, ids: m.norm(m.embed(ids)) - m.norm(m.embed(ids.T)).mean(), ("embed",)),
    "transposed": (lambda m, ids: m.norm(F.embedding(ids, m.turned.weight.T)), ("turned",)),
}


@pytest.mark.parametrize(("forward", "into"), FOLDS.values(), ids=FOLDS)
def test_a_norm_folds_into_the_rows_of_a_table(forward: Any, into: tuple[str, ...]) -> None:
    model = lookup(forward, other=nn.Embedding(5, 6), turned=nn.Linear(5, 6, bias=False))
    _, report = fused(model, IDS)
    assert (report["norm"].action, set(report["norm"].into)) == ("backward", set(into))


def test_a_padding_row_takes_the_shift_too() -> None:
    model = lookup(lambda m, ids: m.norm(m.embed(ids)), embed=nn.Embedding(5, 6, padding_idx=0))
    result, report = fused(model, IDS)
    assert report["norm"].into == ("embed",)
    assert result.embed.padding_idx == 0
    with torch.no_grad():
        assert_close(result.embed.weight[0], model.norm(model.embed.weight[0][None])[0], 1e-12)


KEPT = {
    "read raw": (lambda m, ids: m.norm(m.embed(ids)) + m.embed.weight.mean(0), "embed is also read raw by an add"),
    "a head": (
        lambda m, ids: m.norm(m.embed(ids)).tanh() @ m.embed.weight.T,
        "embed is also used on another input by a matmul",
    ),
    "other input": (
        lambda m, ids: m.norm(m.embed(ids)) + m.embed(ids // 2),
        "embed is also used on another input by an embedding",
    ),
    "read elsewhere": (lambda m, ids: m.norm(y := m.embed(ids)) + y, "the output of embed also feeds an add"),
    "computed": (
        lambda m, ids: m.norm(F.embedding(ids, m.embed.weight * 2)),
        "the table of an embedding is computed in the forward",
    ),
    "parametrized": (lambda m, ids: m.norm(m.wrapped(ids)), "is computed in the forward (parametrized?)"),
    "masked": (lambda m, ids: m.norm(m.embed(ids) * (ids > 0)[..., None]), "its input comes from a mul"),
    "overwritten": (
        lambda m, ids: m.norm(m.embed(ids).masked_fill_((ids == 1)[..., None], 0.0)),
        "its input comes from a masked_fill_",
    ),
    "scaled by a tensor": (lambda m, ids: m.norm(m.embed(ids) * m.linear.bias[0]), "its input comes from a mul"),
    "watched": (lambda m, ids: m.norm(m.watched(ids)), "watched has forward hooks, which see its output"),
    "one of two": (lambda m, ids: m.norm(m.embed(ids) + m.other(ids).exp()), "its input comes from an exp"),
    "in two parts": (
        lambda m, ids: m.norm(m.embed(ids) + m.embed(ids // 2)),
        "embed has several parts in the sum in front of it",
    ),
}


@pytest.mark.parametrize(("forward", "why"), KEPT.values(), ids=KEPT)
def test_a_table_that_cannot_take_a_norm_over_keeps_it(forward: Any, why: str) -> None:
    watched = nn.Embedding(5, 6)
    watched.register_forward_hook(lambda *_: None)
    others = {"wrapped": parametrizations.weight_norm(nn.Embedding(5, 6)), "watched": watched}
    assert why in reason(lookup(forward, other=nn.Embedding(5, 6), **others), IDS)


def test_a_table_that_the_forward_renormalises_keeps_the_norm() -> None:
    model = lookup(lambda m, ids: m.norm(m.embed(ids)), embed=nn.Embedding(5, 6, max_norm=1.0))
    _, report = fuse(model, IDS)
    assert report["norm"].action == "kept"
    assert "embedding_renorm_" in report["norm"].reason


def test_a_table_of_integers_keeps_the_norm() -> None:
    model = lookup(lambda m, ids: m.norm(m.embed(ids).double()))
    model.embed.weight = nn.Parameter(torch.arange(30, dtype=torch.int32).view(5, 6), requires_grad=False)
    assert Reason.NOT_FLOAT in codes(model, IDS)


def test_a_table_that_is_tied_with_a_head_keeps_the_norm_unless_it_is_untied() -> None:
    model = lookup(lambda m, ids: m.head(m.norm(m.embed(ids)).tanh()), head=nn.Linear(6, 5, bias=False))
    model.head.weight = model.embed.weight
    assert Reason.TIED in codes(model, IDS)
    result, report = fused(model, IDS, untie=True)
    assert report["norm"].into == ("embed",)
    assert torch.equal(result.head.weight, model.embed.weight)


def test_a_table_whose_rows_would_overflow_is_left_out() -> None:
    model = lookup(lambda m, ids: m.norm(m.embed(ids)))
    with torch.no_grad():
        model.embed.weight.fill_(3e4)
        model.norm.weight.fill_(30)
    _, report = fuse(model.half(), IDS)
    assert Reason.OUTPUT_CHANGES in report["norm"].codes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_audit_finds_tables_and_parameters(device: str) -> None:
    with torch.device(device):
        model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    found = audit(model, (), {"input_ids": IDS.to(device)})["embeddings.LayerNorm"]
    assert found.into == BERT


# --- whole models --------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXT = {
    "input_ids": torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 7, dtype=torch.long),
}
PIXELS = {"pixel_values": tokens(2, 3, 32, 32)}
BERT = tuple(f"embeddings.{kind}_embeddings" for kind in ("word", "token_type", "position"))


def of(name: str, head: str = "Model", **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return converted(getattr(transformers, f"{name}{head}")(config))


def converted(model: nn.Module) -> nn.Module:
    convert_norms_(model)
    return ready(model)


def clip() -> nn.Module:
    return timm.create_model(
        "vit_base_patch16_clip_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )


#: how to make the model, its inputs, the norm, and what takes it over
MODELS = {
    "bert": (lambda: of("Bert"), TEXT, "embeddings.LayerNorm", BERT),
    "roberta": (lambda: of("Roberta"), TEXT, "embeddings.LayerNorm", BERT),
    "electra": (lambda: of("Electra", embedding_size=32), TEXT, "embeddings.LayerNorm", BERT),
    "distilbert": (
        lambda: of("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
        TEXT,
        "embeddings.LayerNorm",
        (BERT[0], BERT[2]),
    ),
    "modernbert": (
        lambda: of("ModernBert", cls_token_id=1, sep_token_id=2),
        TEXT,
        "embeddings.norm",
        ("embeddings.tok_embeddings",),
    ),
    "bloom": (lambda: of("Bloom", n_head=4, n_layer=2), TEXT, "word_embeddings_layernorm", ("word_embeddings",)),
    "esm": (
        lambda: of("Esm", emb_layer_norm_before=True, position_embedding_type="rotary"),
        TEXT,
        "embeddings.layer_norm",
        BERT[:1],
    ),
    "deberta": (
        lambda: of("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm"),
        TEXT,
        "embeddings.LayerNorm",
        (BERT[0], BERT[2]),
    ),
    "clip": (
        lambda: of("CLIPVision", image_size=32, patch_size=8),
        PIXELS,
        "pre_layrnorm",
        tuple(f"embeddings.{name}" for name in ("class_embedding", "patch_embedding", "position_embedding")),
    ),
}


@pytest.mark.parametrize(("build", "inputs", "name", "into"), MODELS.values(), ids=MODELS)
def test_the_norm_behind_the_embeddings_of_a_model_folds(
    build: Any, inputs: dict[str, Tensor], name: str, into: tuple[str, ...]
) -> None:
    _, report = fused(build(), (), inputs)
    assert (report[name].action, set(report[name].into)) == ("backward", set(into))


@pytest.mark.parametrize("untie", [False, True])
def test_a_bloom_with_a_head_folds_all_its_norms_once_untied(untie: bool) -> None:
    _, report = fused(of("Bloom", "ForCausalLM", n_head=4, n_layer=2), (), TEXT, untie=untie)
    kept = {outcome.name for outcome in report if outcome.action == "kept"}
    assert kept == (set() if untie else {"transformer.ln_f"})


def test_a_clip_of_timm_folds_all_its_norms_into_plain_weights_and_a_file(tmp_path: Path) -> None:
    model, image = converted(clip()), tokens(1, 3, 32, 32)
    result, report = fused(model, image)
    assert_same_outputs(model, result, (tokens(3, 3, 32, 32),))
    assert report["norm_pre"].into == ("cls_token", "pos_embed", "patch_embed.proj")
    assert report.num_kept == 0
    save_fused(result, tmp_path / "clip.safetensors")
    assert_close(load_fused(clip().eval().double(), tmp_path / "clip.safetensors")(image), result(image), EXACT)


def test_tables_load_into_a_stock_model_without_norms() -> None:
    model = lookup(lambda m, ids: m.norm(m.embed(ids) + positions(m, ids)))
    result, _ = fused(model, IDS)
    stock = lookup(lambda m, ids: m.embed(ids) + positions(m, ids))
    stock.norm = nn.Identity()
    assert_same_outputs(model, plain_(stock, result), (IDS,))


def test_tables_load_from_a_file_into_a_fresh_model(tmp_path: Path) -> None:
    model = of("Bert")
    result, _ = fuse(model, (), TEXT)
    save_fused(result, tmp_path / "bert.safetensors")
    fresh = transformers.BertModel(transformers.BertConfig(**SIZES)).eval().double()
    assert_same_outputs(model, load_fused(fresh, tmp_path / "bert.safetensors"), (), TEXT)


def test_a_norm_over_a_table_of_relative_positions_goes_where_both_can() -> None:
    model = lookup(lambda m, ids: m.linear(m.embed(ids)) @ m.norm(m.places.weight).T)
    assert outcomes(model, IDS) == [("norm", "backward", ("places",), "")]
