"""Where norms go in small models, and the reasons for those that stay."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fusing import X, codes, fused, net, norm, outcomes, ready, tokens
from slabformer.nn import Affine, Folded, PRepBN, RepBN
from slabformer.surgery.fuse import Reason

MAPS = tokens(2, 6, 5, 5)
NORMS = {
    "RepBN": lambda: RepBN(6),
    "PRepBN": lambda: PRepBN(6),
    "Affine": lambda: Affine(6),
}


# --- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
def test_each_kind_of_norm_folds_forward(kind: str) -> None:
    model = net(lambda m, x: m.linear(m.norm(x)), norm=NORMS[kind](), linear=nn.Linear(6, 3))
    assert outcomes(model) == [("norm", "forward", ("linear",), "")]


@pytest.mark.parametrize("batch_norm", [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.SyncBatchNorm(6)])
def test_batch_norm_folds_over_its_channel_axis(batch_norm: nn.Module) -> None:
    model = net(lambda m, x: m.conv(m.norm(x)), norm=batch_norm, conv=nn.Conv2d(6, 4, 3))
    assert outcomes(model, MAPS) == [("norm", "forward", ("conv",), "")]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5)], ids=["2-D", "3-D"])
def test_batch_norm_1d_folds_backward(shape: tuple[int, ...]) -> None:
    if len(shape) == 2:
        model = net(lambda m, x: torch.tanh(m.norm(m.layer(x))), norm=nn.BatchNorm1d(3), layer=nn.Linear(6, 3))
    else:
        model = net(lambda m, x: torch.tanh(m.norm(m.layer(x))), norm=nn.BatchNorm1d(3), layer=nn.Conv1d(6, 3, 3))
    assert outcomes(model, tokens(*shape)) == [("norm", "backward", ("layer",), "")]


def test_a_norm_folds_into_all_its_consumers() -> None:
    model = net(
        lambda m, x: m.q(m.norm(x)).sum() + m.conv(m.norm(x).mT).sum() + m.v(m.norm(x)[:, :2]).sum(),
        norm=norm(),
        q=nn.Linear(6, 3),
        conv=nn.Conv1d(6, 4, 2, stride=2),
        v=nn.Linear(6, 2, bias=False),
    )
    result, report = fused(model, X)
    assert report["norm"].into == ("q", "conv", "v")
    assert isinstance(result.v.bias, nn.Parameter)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_norm_folds_into_an_unpadded_conv(groups: int) -> None:
    conv = nn.Conv2d(6, 12, 3, stride=2, dilation=2, groups=groups)
    model = net(lambda m, x: m.conv(m.norm(x)), norm=norm(6, 1), conv=conv)
    assert outcomes(model, MAPS) == [("norm", "forward", ("conv",), "")]


def test_a_flattened_map_folds_into_a_linear_over_all_of_it() -> None:
    model = net(lambda m, x: m.head(m.norm(x).flatten(1)), norm=norm(6, 1), head=nn.Linear(150, 3))
    assert outcomes(model, MAPS) == [("norm", "forward", ("head",), "")]


def test_two_norms_fold_into_their_own_columns_of_one_linear() -> None:
    model = net(
        lambda m, x: m.linear(torch.cat([m.one(x), x.sin(), m.two(x)], -1)),
        one=norm(),
        two=norm(),
        linear=nn.Linear(18, 3),
    )
    assert [row[:3] for row in outcomes(model)] == [("one", "forward", ("linear",)), ("two", "forward", ("linear",))]


def test_gpt2s_transposed_weights_take_a_norm_over() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, 6), self.weight).view(*x.shape[:-1], 3)

    model = net(lambda m, x: m.c_attn(m.norm(x)), norm=norm(), c_attn=Conv1D())
    assert outcomes(model) == [("norm", "forward", ("c_attn",), "")]


NUMBERS = {
    "product": (lambda m, x: m.linear(m.norm(x) * 0.3), ("linear",)),
    "quotient": (lambda m, x: m.linear((2 * m.norm(x)).flip(1) / 3), ("linear",)),
    "two of them": (lambda m, x: m.linear(m.norm(x) * 2) - m.other(m.norm(x)), ("linear", "other")),
    "another norm": (lambda m, x: m.next(-3 * m.norm(x)).tanh(), ("next",)),
}


@pytest.mark.parametrize(("forward", "into"), NUMBERS.values(), ids=NUMBERS)
def test_a_norm_folds_through_a_product_with_a_number(forward: Any, into: tuple[str, ...]) -> None:
    linears = {name: nn.Linear(6, 3) for name in ("linear", "other")}
    _, report = fused(net(forward, norm=norm(), next=norm(), **linears), X)
    assert report["norm"].into == into


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.norm(x) * 0, lambda m, x: m.norm(x) / 0], ids=["product", "quotient"]
)
def test_a_number_that_is_0_keeps_the_norm(forward: Any) -> None:
    model = net(
        lambda m, x: m.linear(x) + m.other(forward(m, x)).nan_to_num(),
        norm=norm(),
        linear=nn.Linear(6, 3),
        other=nn.Linear(6, 3),
    )
    assert codes(model)[0] == Reason.FEEDS_OPERATION


def test_products_with_several_numbers_that_meet_keep_the_norm() -> None:
    model = net(
        lambda m, x: m.linear(torch.cat([(y := m.norm(x.sin())) * 2, y], 1)), norm=norm(), linear=nn.Linear(6, 3)
    )
    assert codes(model)[0] == Reason.SEVERAL_FACTORS


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6)], ids=["matmul", "mm"])
def test_a_linear_written_as_a_product_takes_a_norm_over(shape: tuple[int, ...]) -> None:
    class Product(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    model = net(lambda m, x: m.product(m.norm(x)), norm=norm(), product=Product(6, 3, bias=False))
    assert outcomes(model, tokens(*shape)) == [("norm", "forward", ("product",), "")]


def test_multihead_attention_takes_a_norm_over_in_its_packed_weight() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.attn(y, y, y, need_weights=False)[0]

    model = net(forward, norm=norm(), attn=nn.MultiheadAttention(6, 2, batch_first=True))
    assert outcomes(model) == [("norm", "forward", ("attn.in_proj_weight",), "")]


def test_a_transformer_encoder_keeps_its_outputs_and_folds_its_pre_norms() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, norm_first=True, activation="gelu")
    layer.norm1, layer.norm2 = PRepBN(6), PRepBN(6)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for module in encoder.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # as convert_norms_ does: the fused kernel calls no norm
    _, report = fused(ready(encoder), X)
    assert [o.action for o in report] == ["forward"] * 4


# --- backward ------------------------------------------------------------------------------------------------------


def test_a_norm_folds_backward_into_a_padded_conv() -> None:
    model = net(lambda m, x: F.gelu(m.norm(m.conv(x))), conv=nn.Conv2d(6, 8, 3, padding=1), norm=nn.BatchNorm2d(8))
    assert outcomes(model, MAPS) == [("norm", "backward", ("conv",), "")]


def test_a_norm_over_each_head_folds_backward_into_its_channels_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(m.q_norm(q), m.k_norm(k), v)

    model = net(forward, qkv=nn.Linear(6, 18), q_norm=norm(3), k_norm=norm(3))
    assert [row[:3] for row in outcomes(model)] == [("q_norm", "backward", ("qkv",)), ("k_norm", "backward", ("qkv",))]


def test_a_norm_folds_backward_into_all_that_is_concatenated() -> None:
    model = net(
        lambda m, x: torch.tanh(m.norm(torch.cat([m.one(x), m.two(x)], -1))),
        one=nn.Linear(6, 2),
        two=nn.Linear(6, 4, bias=False),
        norm=norm(),
    )
    assert outcomes(model)[0][1:3] == ("backward", ("one", "two"))


def test_forward_is_preferred() -> None:
    model = net(lambda m, x: m.two(m.norm(m.one(x))), one=nn.Linear(6, 6), norm=norm(), two=nn.Linear(6, 6))
    assert outcomes(model) == [("norm", "forward", ("two",), "")]


def test_a_chain_of_norms_collapses() -> None:
    model = net(
        lambda m, x: torch.tanh(m.three(m.two(m.one(m.linear(x))))),
        linear=nn.Linear(6, 6),
        one=norm(),
        two=norm(),
        three=norm(),
    )
    assert [row[1:3] for row in outcomes(model)] == [
        ("forward", ("three",)),
        ("forward", ("three",)),
        ("backward", ("linear",)),
    ]


def test_a_chain_of_norms_without_linear_becomes_one_affine() -> None:
    model = net(lambda m, x: torch.tanh(m.two(m.one(x))), one=norm(), two=norm())
    result, report = fused(model, X)
    assert [o.action for o in report] == ["forward", "kept"]
    assert isinstance(result.one, Folded)
    assert isinstance(result.two, Affine)


def test_a_frozen_batch_norm_folds_backward() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(8, eps=1e-3)
    for number, buffer in enumerate(frozen.buffers()):
        buffer.copy_(torch.rand(8, generator=torch.Generator().manual_seed(number)) + 0.5)
    model = net(lambda m, x: F.relu(m.norm(m.conv(x))), conv=nn.Conv2d(6, 8, 3, bias=False), norm=frozen)
    assert outcomes(model, MAPS) == [("norm", "backward", ("conv",), "")]


# --- ties and several calls ----------------------------------------------------------------------------------------


def test_a_norm_called_twice_folds_where_both_calls_go() -> None:
    model = net(lambda m, x: m.a(m.norm(x)) + m.b(m.norm(x.sin())), norm=norm(), a=nn.Linear(6, 3), b=nn.Linear(6, 3))
    assert outcomes(model) == [("norm", "forward", ("a", "b"), "")]


def test_a_layer_called_repeatedly_folds_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.linear(m.norm(x))
        return x

    assert outcomes(net(forward, norm=norm(), linear=nn.Linear(6, 6))) == [("norm", "forward", ("linear",), "")]


def test_tied_norms_stay_tied() -> None:
    shared = norm()
    model = net(lambda m, x: m.a(m.one(x)) + torch.tanh(m.two(x)), one=shared, two=shared, a=nn.Linear(6, 6))
    result, report = fused(model, X)
    assert len(report) == 1
    assert result.one is result.two
    assert isinstance(result.one, Affine)


def test_a_norm_that_one_call_cannot_lose_is_kept() -> None:
    model = net(lambda m, x: m.a(m.norm(x)) + torch.tanh(m.norm(x.sin())), norm=norm(), a=nn.Linear(6, 6))
    assert codes(model)[0] == Reason.FEEDS_OPERATION


def test_tied_weights_keep_the_norm() -> None:
    model = net(
        lambda m, ids: m.head(m.norm(m.embed(ids))),
        embed=nn.Embedding(5, 6),
        norm=norm(),
        head=nn.Linear(6, 5, bias=False),
    )
    model.head.weight = model.embed.weight
    assert Reason.TIED in codes(model, torch.tensor([[0, 1, 2, 4]]))


def test_a_linear_that_also_works_on_something_else_keeps_the_norm() -> None:
    model = net(lambda m, x: m.linear(m.norm(x)) + m.linear(x), norm=norm(), linear=nn.Linear(6, 6))
    assert Reason.SHARED_LAYER in codes(model)


def test_a_weight_that_is_also_read_raw_keeps_the_norm() -> None:
    model = net(lambda m, x: m.linear(m.norm(x)) * m.linear.weight.sum(), norm=norm(), linear=nn.Linear(6, 6))
    assert Reason.READ_RAW in codes(model)
