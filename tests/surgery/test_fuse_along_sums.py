"""Post-norm blocks: the scale of a norm is carried along the residual stream, so that no norm need stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusing import X, assert_same_outputs, fused, net, norm, ready, reason, tokens
from slabformer.nn import Affine
from slabformer.surgery.audit import audit
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import Reason, fuse, fuse_, load_fused, save_fused
from slabformer.surgery.verify import verify

LINEARS = ("embed", "up", "down", "more", "head")


def children(**others: nn.Module) -> dict[str, nn.Module]:
    return {"norm": norm(), **{name: nn.Linear(6, 6) for name in LINEARS}, **others}


def block(m: Any, x: Tensor, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """A post-norm block without the norm that ends it."""
    y = m.norm(m.embed(x) + x)
    return m.head(join(y, m.down(m.up(y).sigmoid())))


def folds_into(forward: Any, *into: str, **others: nn.Module) -> None:
    _, report = fused(net(forward, **children(**others)), X)
    assert (report["norm"].action, set(report["norm"].into)) == ("forward", set(into))


PASSED = {
    "sum": torch.add,
    "operands swapped": lambda y, z: z + y,
    "in place": lambda y, z: z.add_(y),
    "into the norm's output": lambda y, z: y.add_(z),
    "moved": lambda y, z: (y.roll(1, 1) + z.roll(1, 1)).flip(1),
    "in a part": lambda y, z: torch.cat([y[:, 1:] + z[:, 1:], (y + z)[:, :1]], 1),
    "multiplied": lambda y, z: y * 0.5 + z,
    "both multiplied": lambda y, z: (y / 4 + z * 3) * 2,
}


@pytest.mark.parametrize("join", PASSED.values(), ids=PASSED)
def test_what_reads_takes_the_map_and_what_joins_takes_its_inverse(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    folds_into(lambda m, x: block(m, x, join), "up", "head", "down")


def test_sums_in_a_row_are_followed_to_their_readers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.embed(x) + x)
        y = y + m.down(m.up(y).sigmoid())
        return m.head(y + m.more(y))

    folds_into(forward, "up", "down", "more", "head")


def test_the_next_norm_takes_the_scale() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.embed(x) + x)
        return m.last(y + m.down(m.up(y).sigmoid())).tanh()

    result, report = fused(net(forward, **children(last=norm())), X)
    assert report["norm"].into == ("up", "last", "down")
    assert report["last"].action == "kept"
    assert isinstance(result.last, Affine)


def test_a_norm_in_the_branch_takes_the_inverse() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.embed(x) + x)
        return m.head(y + m.inner(m.up(y).sigmoid()))

    folds_into(forward, "up", "inner", "head", inner=norm())


def test_new_biases_take_the_shift() -> None:
    folds_into(block, "up", "head", "down", down=nn.Linear(6, 6, bias=False))


def test_a_table_that_is_added_behind_the_norm_takes_the_inverse() -> None:
    table = nn.Module()
    table.positions = nn.Parameter(torch.randn(4, 6))
    folds_into(lambda m, x: m.head(m.norm(m.embed(x) + x) + m.table.positions), "table.positions", "head", table=table)


REFUSED: dict[str, tuple[Any, Reason]] = {
    "output": (lambda m, x: (y := m.norm(x)) + m.down(m.up(y).sigmoid()), Reason.MODEL_OUTPUT),
    "norm is output": (lambda m, x: (block(m, x), m.norm(m.embed(x) + x)), Reason.MODEL_OUTPUT),
    "activation behind": (lambda m, x: (m.norm(x) + m.down(x)).sigmoid(), Reason.FEEDS_OPERATION),
    "input joins": (lambda m, x: m.head(m.norm(m.embed(x) + x) + x), Reason.COMES_FROM_INPUT),
    "activation joins": (
        lambda m, x: m.head((y := m.norm(m.embed(x) + x)) + m.up(y).sigmoid()),
        Reason.COMES_FROM_OPERATION,
    ),
    "branch read elsewhere": (
        lambda m, x: m.head((y := m.norm(x)) + (z := m.down(m.up(y).sigmoid()))) + z.sin(),
        Reason.SHARED_OUTPUT,
    ),
    "both from the norm": (lambda m, x: m.head((y := m.norm(m.embed(x) + x)) + y.roll(1, 1)), Reason.SEVERAL_PARTS),
    "sum and norm meet": (
        lambda m, x: m.head(torch.cat([y := m.norm(m.embed(x) + x), y + m.down(m.up(y).sigmoid())], 1)),
        Reason.SEVERAL_PARTS,
    ),
    "broadcast over channels": (lambda m, x: m.head(m.norm(m.embed(x) + x) + m.one(x)), Reason.BROADCAST),
    "weighted": (lambda m, x: m.head(torch.add(m.norm(x), m.down(x), alpha=2)), Reason.FEEDS_SUM),
    "branch added twice": (
        lambda m, x: m.head((y := m.norm(x)) + (z := m.down(m.up(y).sigmoid())) + z.roll(1, 1)),
        Reason.SEVERAL_PARTS,
    ),
    "joined by itself": (lambda m, x: m.head(m.norm(m.embed(x) + x) + m.norm(x)), Reason.SEVERAL_PARTS),
}


@pytest.mark.parametrize(("forward", "code"), REFUSED.values(), ids=REFUSED)
def test_a_stream_that_cannot_be_divided_keeps_the_norm(forward: Any, code: Reason) -> None:
    _, report = fused(net(forward, **children(one=nn.Linear(6, 1))), X)
    assert report["norm"].action == "kept"
    assert code in report["norm"].codes


def test_the_reason_of_the_third_way_stands_behind_the_others() -> None:
    words = reason(net(REFUSED["activation joins"][0], **children()))
    assert words == (
        "its output also feeds an add (post-norm block); its input comes from the model's own inputs; "
        "its input comes from a sigmoid"
    )


@pytest.mark.parametrize(
    ("dtype", "value", "code"),
    [
        (torch.float32, 1e-6, None),
        (torch.float32, 0.0, Reason.SCALE_NEAR_ZERO),
        (torch.float32, 1e-9, Reason.SCALE_NEAR_ZERO),
        (torch.float16, 1e-2, Reason.SCALE_NEAR_ZERO),
        (torch.float16, 2e-2, None),
        (torch.float16, 1e2, Reason.SCALE_NEAR_ZERO),
    ],
)
def test_scales_out_of_the_range_of_the_dtype_keep_the_norm(
    dtype: torch.dtype, value: float, code: Reason | None
) -> None:
    model = net(block, **children(norm=Affine(6)))
    with torch.no_grad():
        model.norm.weight.fill_(0.5)[3] = value
    result, report = fuse(model.to(dtype), X.to(dtype))
    assert report["norm"].codes[2:] == (() if code is None else (code,))
    if code is None:
        verify(model, result, [X.to(dtype)], rtol=1e-2 if dtype is torch.float16 else 1e-5)
    else:
        assert "its scale of channel 3 is too" in report["norm"].reason


def test_a_norm_that_stays_ends_the_row_and_the_next_begins_anew() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.embed(x) + x)
        for number, norm in enumerate(m.norms):
            y = norm(y + m.branches[number](y.clone()))
        return m.head(y)

    model = net(
        forward,
        norm=Affine(6),
        norms=nn.ModuleList(Affine(6) for _ in range(3)),
        branches=nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6)) for _ in range(3)),
        embed=nn.Linear(6, 6),
        head=nn.Linear(6, 6),
    )
    with torch.no_grad():
        for norm in (model.norm, model.norms[0], model.norms[1]):
            norm.weight[3] = 1e-5
    _, report = fused(model, X)
    assert [o.action for o in report] == ["forward", "kept", "forward", "forward"]
    assert report["norms.0"].codes[-1] == Reason.SCALE_NEAR_ZERO


# --- models --------------------------------------------------------------------------------------------------------


def converted(model: nn.Module) -> nn.Module:
    convert_norms_(model)
    return ready(model)


class Encoder(nn.Module):
    """torch's post-norm encoder, as "Attention is all you need" has it, between two Linears."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def test_a_post_norm_encoder_loses_all_norms() -> None:
    model = converted(Encoder())
    result, report = fused(model, X)
    assert report.num_kept == 0
    assert_same_outputs(model, result, (tokens(3, 9, 6),))


def test_a_post_norm_decoder_with_cross_attention_loses_all_but_the_last() -> None:
    model = converted(nn.Transformer(8, 2, 2, 2, 16, batch_first=True))
    _, report = fused(model, (tokens(2, 4, 8), tokens(2, 3, 8, seed=1)))
    assert [o.name for o in report if o.action == "kept"] == ["decoder.norm"]


class PostNormViT(nn.Module):
    """Patches, a class token, a position table, and blocks as the first Transformer had them."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm_pre = nn.LayerNorm(8)
        self.attn = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(depth))
        self.norm1 = nn.ModuleList(nn.LayerNorm(8) for _ in range(depth))
        self.norm2 = nn.ModuleList(nn.LayerNorm(8) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.norm_pre(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)
        for attn, mlp, norm1, norm2 in zip(self.attn, self.mlp, self.norm1, self.norm2, strict=True):
            x = norm1(x + attn(x, x, x, need_weights=False)[0])
            x = norm2(x + mlp(x))
        return self.head(x[:, 0])


def test_a_post_norm_vit_loses_all_norms() -> None:
    _, report = fused(converted(PostNormViT()), tokens(2, 3, 8, 8))
    assert report.num_kept == 0


def test_an_audit_shows_it() -> None:
    report = audit(Encoder(), X.float())
    assert (len(report), report.num_kept) == (6, 0)


def test_a_fused_post_norm_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model = converted(Encoder())
    result, _ = fuse(model, X)
    save_fused(result, tmp_path / "fused.safetensors")
    restored = load_fused(Encoder().double().eval(), tmp_path / "fused.safetensors")
    assert_same_outputs(model, restored, (X,))


def test_fusing_twice_changes_nothing_more() -> None:
    model = converted(Encoder())
    first = fuse_(model, X)
    assert first.num_kept == 0
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(fuse_(model, X)) == 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30, "max_position_embeddings": 16}
BERT = {**SMALL, "hidden_size": 8, "intermediate_size": 16}


def transformers_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    hf = pytest.importorskip("transformers", reason="the models are its own")
    if name == "bert":
        model = hf.BertForSequenceClassification(hf.BertConfig(**BERT))
    elif name == "roberta":
        model = hf.RobertaForSequenceClassification(hf.RobertaConfig(**{**BERT, "max_position_embeddings": 20}))
    elif name == "distilbert":
        config = hf.DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=30)
        model = hf.DistilBertForSequenceClassification(config)
    else:
        sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 8}
        tokens_of = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = hf.BartConfig(**sizes, **widths, **tokens_of, vocab_size=30, max_position_embeddings=16)
        model = hf.BartForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 30, (2, 7), generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 4:] = 0
    if name == "bart":
        inputs["decoder_input_ids"] = torch.randint(3, 30, (2, 5), generator=generator)
    return model, inputs


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("bert", set()),
        ("roberta", set()),
        ("distilbert", set()),
        # the first is an output of the model, the second stands before a head that is tied with the embedding
        ("bart", {"model.encoder.layers.1.final_layer_norm", "model.decoder.layers.1.final_layer_norm"}),
    ],
)
def test_transformers_of_the_first_days_lose_their_norms(name: str, kept: set[str]) -> None:
    torch.manual_seed(0)
    model, inputs = transformers_model(name)
    model = converted(model)
    result, report = fuse(model, (), inputs)
    assert {o.name for o in report if o.action == "kept"} == kept
    other = {key: value if key == "attention_mask" else value.flip(1) for key, value in inputs.items()}
    verify(model, result, [inputs, other], rtol=1e-9)
