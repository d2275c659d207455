"""Every code of a reason is given by some model, and documented."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import slabformer as sf
from fusing import X, net, norm, tokens
from slabformer.nn import Affine
from slabformer.surgery.audit import audit
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.convert_attention import convert_attention_
from slabformer.surgery.converted import LeftModule
from slabformer.surgery.fuse import Reason, fuse
from slabformer.surgery.reasons import RefusalError, Why

PAGE = Path(__file__).parent.parent.parent / "docs" / "fusing.md"
Forward = Callable[..., Any]


def kept(forward: Forward, x: Any = X, options: dict[str, Any] | None = None, **children: nn.Module) -> set[Reason]:
    """Codes of the norms that stay, with the children that most models here have."""
    usual = {"norm": norm(), "linear": nn.Linear(6, 6), "mix": nn.Linear(4, 4), "embedding": nn.Embedding(6, 6)}
    _, report = fuse(net(forward, **{**usual, **children}), x, **(options or {}))
    return {code for outcome in report for code in outcome.codes}


def left(module: nn.Module) -> set[Reason]:
    """Codes of what looks like a norm beside one that is converted."""
    return {norm.code for norm in convert_norms_(nn.Sequential(nn.LayerNorm(6), module)).left}


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.off = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


class Biasless(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Typed(nn.Module):
    """A block that runs one way behind its own norm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = norm(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)) * (2 if type(self.norm).__name__ == "RepBN" else 3)


class OwnNorm(nn.Module):
    """What calls itself a norm, and computes anything."""

    def __init__(self, forward: Forward, gain: tuple[int, ...] | None = (6,)) -> None:
        super().__init__()
        self.body = forward
        self.weight = None if gain is None else nn.Parameter(torch.ones(gain))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class TwoInputNorm(nn.Module):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * condition


class HeldNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.deeper = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.deeper(self.inner(x))


class InCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.linear(x), x.shape[-1:])


def hooked() -> nn.Module:
    linear = nn.Linear(6, 6)
    linear.register_forward_pre_hook(lambda *_: None)
    return linear


def unsaved() -> nn.Module:
    holder = nn.Module()
    holder.register_buffer("table", torch.randn(4, 6), persistent=False)
    return holder


def tied() -> set[Reason]:
    model = net(lambda m, x: m.linear(m.norm(x)) + m.mix(x), norm=norm(), linear=nn.Linear(6, 6), mix=nn.Linear(6, 6))
    model.mix.weight = model.linear.weight
    return {code for outcome in fuse(model, X)[1] for code in outcome.codes}


def written(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = m.norm(x)
    x.add_(1)
    return m.linear(y) + x


def near_zero() -> set[Reason]:
    pad = sf.nn.PadTokens(6)
    model = net(lambda m, x: m.linear(m.pad(m.norm(x.sin()), 1, 1)), norm=Affine(6), pad=pad, linear=nn.Linear(6, 6))
    with torch.no_grad():
        model.norm.weight[2] = 1e-6
    return {code for outcome in fuse(model, tokens(1, 3, 3, 6))[1] for code in outcome.codes}


def branching(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.linear(y) if y.sum().item() > 0 else -y


def in_code() -> set[Reason]:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), InCode())
    return {norm.code for norm in audit(model, X.float()).left}


def pair() -> dict[str, nn.Module]:
    return {"norm": norm(), "linear": nn.Linear(6, 6)}


def over_maps() -> set[Reason]:
    class MapNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.LayerNorm(6), MapNorm(6))
    return {norm.code for norm in convert_norms_(model, norm="rmsnorm").left}


#: of tokens that no model says the layout of
GRID: dict[str, Any] = {"grid_size": (2, 2), "num_prefix_tokens": 0}


class OwnAttention(nn.Module):
    """What looks like a softmax attention, and computes anything."""

    def __init__(self, forward: Forward, num_heads: int = 2, device: str = "cpu", **others: Any) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18, device=device), nn.Linear(6, 6, device=device)
        self.num_heads, self.body = num_heads, forward
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def softmax_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def left_attention(*args: Any, **kwargs: Any) -> set[Reason]:
    """Codes of what looks like an attention beside one that is converted."""
    model = nn.Sequential(OwnAttention(softmax_attention), OwnAttention(*args, **kwargs))
    converted = convert_attention_(model, **GRID)
    assert converted == ["0"]
    return {attention.code for attention in converted.left}


MAPS = tokens(2, 6, 5, 5)
TRANSPOSED = nn.ConvTranspose2d(6, 6, 3)
#: of every code, a model that gives it
EXAMPLES: dict[Reason, Callable[[], set[Reason]]] = {
    Reason.MODEL_OUTPUT: lambda: kept(lambda m, x: m.norm(x.sin())),
    Reason.FEEDS_SUM: lambda: kept(lambda m, x: m.norm(x) + x),
    Reason.FEEDS_OPERATION: lambda: kept(lambda m, x: m.linear(F.gelu(m.norm(x)))),
    Reason.FEEDS_NORM: lambda: kept(lambda m, x: m.linear(m.norm(m.norm(x)))),
    Reason.KEPT_OUTPUT: lambda: kept(
        lambda m, x: m.linear(m.id(m.norm(x.sin()))), options={"keep": "id"}, id=nn.Identity()
    ),
    Reason.FURTHER_ARGUMENT: lambda: kept(lambda m, x: F.linear(x[0], m.norm(x.sin())[0])),
    Reason.NOT_USED: lambda: kept(lambda m, x: m.linear(x)),
    Reason.PADDED: lambda: kept(lambda m, x: m.linear(F.pad(m.norm(x.sin()), (0, 0, 0, 1)))),
    Reason.UNEVEN: lambda: kept(lambda m, x: m.up(m.norm(x.sin())), MAPS, norm=norm(6, 1), up=TRANSPOSED),
    Reason.CHANNELS_MIXED: lambda: kept(lambda m, x: m.norm(x.sin()).mean(-1)),
    Reason.CHANNELS_SPREAD: lambda: kept(lambda m, x: m.linear(m.norm(x.sin()).mT.reshape(2, 4, 6))),
    Reason.OTHER_AXIS: lambda: kept(lambda m, x: m.mix(m.norm(x.sin()).mT)),
    Reason.PICKED_BY_MASK: lambda: kept(lambda m, x: m.linear(m.norm(x.sin())[torch.ones(2, 4, dtype=torch.bool)])),
    Reason.CAST: lambda: kept(lambda m, x: m.linear(m.norm(x).int().double())),
    Reason.DROPOUT: lambda: kept(lambda m, x: m.linear(F.dropout(m.norm(x.sin()), 0.5, training=True))),
    Reason.SEVERAL_FACTORS: lambda: kept(lambda m, x: m.linear(torch.cat([m.norm(x.sin()) * 2, m.norm(x.sin())], 1))),
    Reason.BROADCAST: lambda: kept(
        lambda m, x: m.norm(m.linear(x) + m.one(x)).tanh(), linear=nn.Linear(6, 6), one=nn.Linear(6, 1)
    ),
    Reason.NO_BIAS: lambda: kept(lambda m, x: m.norm(x) @ m.linear.weight),
    Reason.COMPUTED_WEIGHT: lambda: kept(
        lambda m, x: m.linear(m.norm(x)), linear=parametrizations.weight_norm(nn.Linear(6, 6))
    ),
    Reason.TIED: tied,
    Reason.SHARED_LAYER: lambda: kept(lambda m, x: m.linear(m.norm(x)) + m.linear(x)),
    Reason.SHARED_NORM: lambda: kept(
        lambda m, x: m.linear(F.pad(m.norm(x.sin()), (0, 0, 0, 1))) + m.linear(F.pad(m.norm(x.cos()), (0, 0, 0, 1)))
    ),
    Reason.SHARED_OUTPUT: lambda: kept(lambda m, x: torch.tanh(m.norm(y := m.linear(x))) + y),
    Reason.SEVERAL_PARTS: lambda: kept(lambda m, x: m.norm(m.linear(x) + m.linear(x.sin())).tanh()),
    Reason.READ_RAW: lambda: kept(lambda m, x: m.linear(m.norm(x)) * m.linear.weight.sum()),
    Reason.WRAPPER: lambda: kept(lambda m, x: m.adapted(m.norm(x)), adapted=Adapted()),
    Reason.NOT_FLOAT: lambda: kept(lambda m, x: m.norm(m.table.ids.double()).tanh() + x, table=integers()),
    Reason.NOT_SAVED: lambda: kept(lambda m, x: m.norm(m.linear(x) + m.held.table).tanh(), held=unsaved()),
    Reason.IN_PLACE: lambda: kept(written),
    Reason.HOOKS: lambda: kept(lambda m, x: m.linear(m.norm(x)), linear=hooked()),
    Reason.COMES_FROM_OPERATION: lambda: kept(lambda m, x: m.norm(x.sin())),
    Reason.COMES_FROM_INPUT: lambda: kept(lambda m, x: m.norm(x)),
    Reason.COMES_FROM_NORM: lambda: kept(lambda m, x: m.norm(m.first(x)).tanh() + m.first(x), first=norm()),
    Reason.SCALE_NEAR_ZERO: near_zero,
    Reason.KEEP: lambda: kept(lambda m, x: m.linear(m.norm(x)), options={"keep": "norm"}),
    Reason.NOT_TRACEABLE: lambda: kept(branching),
    Reason.OUTPUT_CHANGES: lambda: kept(lambda m, x: m.linear(m.norm(x)), linear=Biasless(6, 6, bias=False)),
    Reason.AFFINE_CHANGES_OUTPUT: lambda: kept(lambda m, x: m.block(x), block=Typed()),
    Reason.SEVERAL_AXES: lambda: left(nn.LayerNorm((4, 6))),
    Reason.PER_HEAD: lambda: left(OwnNorm(lambda m, x: F.layer_norm(x, (6,)) * m.weight, (4, 6))),
    Reason.UNIT_LENGTH: lambda: left(OwnNorm(lambda m, x: F.normalize(x, dim=-1) * m.weight)),
    Reason.MIXES_POSITIONS: lambda: left(nn.GroupNorm(2, 6)),
    Reason.UNKNOWN_WIDTH: lambda: left(OwnNorm(lambda m, x: F.layer_norm(x, x.shape[-1:]), None)),
    Reason.TWO_LAYOUTS: lambda: left(OwnNorm(either_layout)),
    Reason.NOT_A_NORM: lambda: left(OwnNorm(lambda m, x: x.cumsum(-1) * m.weight)),
    Reason.DIFFERS_IN_TRAINING: lambda: left(
        OwnNorm(lambda m, x: F.layer_norm(x, (6,)) * m.weight * (2 if m.training else 1))
    ),
    Reason.LARGE_INPUTS_ONLY: lambda: left(
        OwnNorm(lambda m, x: torch.where(x.abs().amax() > 100, F.layer_norm(x, (6,)), x) * m.weight)
    ),
    Reason.HOLDS_LAYERS: lambda: left(HeldNorm()),
    Reason.FURTHER_INPUTS: lambda: left(TwoInputNorm()),
    Reason.CANNOT_RUN: lambda: left(OwnNorm(lambda m, x: x.no_such_method() * m.weight)),
    Reason.IN_CODE: in_code,
    Reason.OVER_MAPS: over_maps,
    Reason.NOT_SOFTMAX_ATTENTION: lambda: left_attention(lambda m, x: softmax_attention(m, x) + x),
    Reason.UNEVEN_HEADS: lambda: left_attention(softmax_attention, num_heads=4),
    Reason.NO_GRID: lambda: left_attention(softmax_attention, config=SimpleNamespace(vocab_size=9)),
    Reason.FEW_KEYS: lambda: left_attention(softmax_attention, qkv=None, q=nn.Linear(6, 6), kv=nn.Linear(6, 12)),
    Reason.NO_VALUES: lambda: left_attention(softmax_attention, device="meta"),
    Reason.NOT_AFFINE: lambda: {
        norm.code
        for norm in fuse(net(lambda m, x: m.linear(m.norm(x)) + m.other(x), other=nn.LayerNorm(6), **pair()), X)[1].left
    },
}


def integers() -> nn.Module:
    holder = nn.Module()
    holder.register_buffer("ids", torch.arange(24).view(4, 6))
    return holder


def either_layout(m: Any, x: Tensor) -> Tensor:
    if x.ndim == 4:
        return F.layer_norm(x.permute(0, 2, 3, 1), (6,), m.weight).permute(0, 3, 1, 2)
    return F.layer_norm(x, (6,), m.weight)


@pytest.mark.filterwarnings("ignore:The .* is not called")
@pytest.mark.parametrize("code", Reason)
def test_every_code_is_given_by_a_model(code: Reason) -> None:
    assert code in EXAMPLES[code]()


@pytest.mark.parametrize("code", Reason)
def test_the_page_says_what_every_code_means_and_what_to_do(code: Reason) -> None:
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{code}` |"))
    assert all(len(cell.strip()) > 5 for cell in row.strip("|").split("|"))


def test_the_page_lists_no_code_that_is_gone() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(Reason)


def test_codes_stand_in_text_and_json_beside_the_words() -> None:
    _, report = fuse(net(lambda m, x: m.norm(x), norm=norm()), X)
    words = "its output is the model's output; its input comes from the model's own inputs"
    assert report["norm"].codes == (Reason.MODEL_OUTPUT, Reason.COMES_FROM_INPUT)
    assert str(report["norm"]) == f"norm kept as Affine: {words} [model-output, comes-from-input]"
    assert f"{words} [model-output, comes-from-input]" in report.table()
    (row,) = json.loads(json.dumps(report.to_dict()))["norms"]
    assert row == {
        "name": "norm",
        "action": "kept",
        "into": [],
        "reason": words,
        "codes": ["model-output", "comes-from-input"],
    }


def test_codes_of_what_cannot_be_converted_stand_there_too() -> None:
    report = audit(nn.Sequential(nn.LayerNorm(6), nn.LayerNorm((4, 6))), X.float())
    assert report.left == (LeftModule("1", "LayerNorm", report.left[0].reason, Reason.SEVERAL_AXES),)
    assert "[several-axes]" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["left"][0]["code"] == "several-axes"


def test_attention_that_is_left_shares_the_codes_of_norms() -> None:
    assert left_attention(lambda m, x: x.no_such_method()) == {Reason.CANNOT_RUN}

    class Biased(OwnAttention):
        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return softmax_attention(self, x)

    converted = convert_attention_(nn.Sequential(OwnAttention(softmax_attention), Biased(softmax_attention)), **GRID)
    words = "its forward also takes bias, which linear attention cannot"
    assert converted.left == (("1", "Biased", words, Reason.FURTHER_INPUTS),)


def test_a_norm_that_folds_has_no_code() -> None:
    _, report = fuse(net(lambda m, x: m.linear(m.norm(x)), norm=norm(), linear=nn.Linear(6, 6)), X)
    assert report["norm"].codes == ()


def test_several_reasons_have_every_code_once() -> None:
    one, two = Why.of(Reason.PADDED, "one"), Why.of(Reason.TIED, "two")
    assert Why.joined([one, two, one], "; ") == Why((Reason.PADDED, Reason.TIED), "one; two; one")
    assert RefusalError.of(Why.joined([one, two], " and ")).why.codes == (Reason.PADDED, Reason.TIED)
