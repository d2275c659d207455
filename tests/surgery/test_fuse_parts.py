"""Weights and biases that a forward cuts out of parameters, or puts together from several."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusing import assert_same_outputs, fused, net, norm, ready, tokens
from slabformer.nn import RepBN
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import load_fused, save_fused
from tolerances import EXACT, assert_close

X = tokens(2, 4, 6)


class SplitBias(nn.Module):
    """Queries, keys and values as BEiT computes them: no bias of their own, the keys' is a buffer of zeros."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.register_buffer("k_bias", torch.zeros(6), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return F.linear(x, weight=self.qkv.weight, bias=bias).sigmoid()


def beit(seed: int = 0) -> nn.Module:
    return ready(nn.Sequential(norm(), SplitBias()), seed=seed)


def attend(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    memory = m.memory_norm(memory)
    return m.attn(m.norm(x), memory, memory, need_weights=False)[0]


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 2, batch_first=True, **options)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "new bias"])
def test_queries_and_memory_fold_into_their_own_rows_of_a_packed_weight(bias: bool) -> None:
    model = net(attend, norm=norm(), memory_norm=norm(), attn=attention(bias=bias))
    _, report = fused(model, (X, tokens(2, 3, 6, seed=1)))
    assert [o.into for o in report] == [("attn.in_proj_weight[0:6]",), ("attn.in_proj_weight[6:18]",)]


def test_keys_and_values_of_different_norms_fold_into_their_own_rows() -> None:
    model = net(
        lambda m, x: m.attn(m.q(x), m.k(x), m.v(x), need_weights=False)[0],
        q=norm(),
        k=norm(),
        v=norm(),
        attn=attention(),
    )
    _, report = fused(model, X)
    assert [o.into[0].removeprefix("attn.in_proj_weight") for o in report] == ["[0:6]", "[6:12]", "[12:18]"]


def test_a_transformer_decoder_folds_its_pre_norms_and_the_norm_of_its_memory() -> None:
    options: dict[str, Any] = {"batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(6, 2, 12, **options)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), enable_nested_tensor=False)
    model = nn.Transformer(6, 2, 2, 2, 12, custom_encoder=encoder, **options)
    convert_norms_(model)
    _, report = fused(ready(model), (X, tokens(2, 3, 6, seed=1)))
    assert {o.name for o in report if o.action == "kept"} == {"decoder.norm"}


@pytest.mark.parametrize(
    "cut",
    [
        lambda w: w.split([2, 4])[1],
        lambda w: w.chunk(3)[1],
        lambda w: w[2:5],
        lambda w: w.t()[:, 1:4].t(),
        lambda w: w.flip(0),
        lambda w: torch.cat([w[3:], w[:3]]),
    ],
    ids=["split", "chunk", "slice", "transposed", "flipped", "rearranged"],
)
def test_rows_of_a_weight_take_a_norm_over(cut: Any) -> None:
    model = net(
        lambda m, x: F.linear(m.norm(x), cut(m.linear.weight), cut(m.linear.bias[:, None])[:, 0]),
        norm=norm(),
        linear=nn.Linear(6, 6),
    )
    _, report = fused(model, X)
    assert report["norm"].action == "forward"


@pytest.mark.parametrize(
    ("forward", "why"),
    {
        "overlap": (
            lambda m, x: (
                F.linear(m.norm(x), m.linear.weight[:4], m.linear.bias[:4]).sum()
                + F.linear(x, m.linear.weight[3:], m.linear.bias[3:]).sum()
            ),
            "linear[0:4] is also used on another input by a linear",
        ),
        "columns": (
            lambda m, x: F.linear(m.norm(x), m.linear.weight.flip(1), m.linear.bias),
            "the weight of a linear is computed in the forward",
        ),
        "repeated rows": (
            lambda m, x: F.linear(m.norm(x), m.linear.weight.repeat(2, 1)),
            "the weight of a linear is computed in the forward",
        ),
        "transposed": (
            lambda m, x: F.linear(m.norm(x), m.linear.weight.t(), m.linear.bias).sum() + m.linear.weight.sum(),
            "linear is also read raw by a sum",
        ),
        "bias of constants": (
            lambda m, x: F.linear(m.norm(x), m.linear.weight, torch.cat([m.linear.bias[:3], x.new_zeros(3)])),
            "the bias of linear is computed in the forward",
        ),
        "bias read elsewhere": (
            lambda m, x: F.linear(m.norm(x), m.linear.weight[:3], m.linear.bias[:3]).sum() + m.linear.bias[2:].sum(),
            "linear[0:3] is also read raw by a sum",
        ),
    }.values(),
    ids=["overlap", "columns", "repeated rows", "transposed", "bias of constants", "bias read elsewhere"],
)
def test_other_arrangements_keep_the_norm(forward: Any, why: str) -> None:
    _, report = fused(net(forward, norm=norm(), linear=nn.Linear(6, 6)), X)
    assert why in report["norm"].reason


def test_a_weight_of_one_row_or_column_takes_a_norm_over() -> None:
    narrow = net(lambda m, x: m.linear(m.norm(x)), norm=RepBN(1), linear=nn.Linear(1, 3))
    assert fused(narrow, tokens(2, 4, 1))[1]["norm"].action == "forward"
    wide = net(lambda m, x: m.linear(m.norm(x)), norm=norm(), linear=nn.Linear(6, 1))
    assert fused(wide, X)[1]["norm"].action == "forward"
    single = net(lambda m, x: m.linear(m.norm(x)), norm=RepBN(1), linear=nn.Linear(1, 1))
    assert fused(single, tokens(2, 4, 1))[1]["norm"].action == "forward"


def test_a_bias_put_together_from_parameters_and_a_buffer_takes_the_shift(tmp_path: Path) -> None:
    model = beit()
    result, report = fused(model, X)
    assert report["0"].into == ("1.qkv",)
    assert "1.k_bias" in result.state_dict(), "a buffer that holds a shift must be saved"
    save_fused(result, tmp_path / "beit.safetensors")
    restored = load_fused(beit(seed=3), tmp_path / "beit.safetensors")
    assert_close(restored(X), result(X), EXACT)
    save_fused(restored, tmp_path / "again.safetensors")
    assert_same_outputs(model, load_fused(beit(seed=4), tmp_path / "again.safetensors"), (X,))


def test_a_buffer_that_something_else_reads_keeps_the_norm() -> None:
    model = net(lambda m, x: m.split(m.norm(x)).sum() + m.split.k_bias.exp().sum(), norm=norm(), split=SplitBias(True))
    _, report = fused(model, X)
    assert "split.qkv is also read raw by an exp" in report["norm"].reason
