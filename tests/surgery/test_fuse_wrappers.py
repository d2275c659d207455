"""Adapters and other layers that hold more than their forward shows: what merging does afterwards stays true."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fusing import X, assert_same_outputs, fused, net, norm, reason, tokens
from slabformer.surgery.fuse import Reason, fuse

RANK, SCALING = 2, 1.5


class LoraLinear(nn.Module):
    """The structure of PEFT's: the layer, adapters by name, of which one is active, merging into the layer."""

    def __init__(self, base: nn.Module, adapters: tuple[str, ...] = ("default",)) -> None:
        super().__init__()
        self.base_layer, self.active, self.merged = base, True, False
        self.lora_A = nn.ModuleDict({name: self.down(base) for name in adapters})
        self.lora_B = nn.ModuleDict({name: self.up(base) for name in adapters})

    def down(self, base: Any) -> nn.Module:
        return nn.Linear(base.in_features, RANK, bias=False)

    def up(self, base: Any) -> nn.Module:
        return nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.active and not self.merged:
            y = y + self.lora_B["default"](self.lora_A["default"](x)) * SCALING
        return y

    def update(self) -> Tensor:
        return self.lora_B["default"].weight.flatten(1) @ self.lora_A["default"].weight.flatten(1) * SCALING

    @torch.no_grad()
    def merge(self, sign: int = 1) -> None:
        weight = self.base_layer.weight
        weight += sign * self.update().view_as(weight)
        self.merged = sign == 1


class LoraConv(LoraLinear):
    """The same around a convolution of kernel 1."""

    def down(self, base: Any) -> nn.Module:
        return nn.Conv2d(base.in_channels, RANK, 1, bias=False)

    def up(self, base: Any) -> nn.Module:
        return nn.Conv2d(RANK, base.out_channels, 1, bias=False)


class LoraEmbedding(nn.Module):
    """The same around a table."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Parameter(torch.randn(RANK, base.num_embeddings))
        self.lora_B = nn.Parameter(torch.randn(base.embedding_dim, RANK))

    def forward(self, ids: Tensor) -> Tensor:
        return self.base_layer(ids) + (F.embedding(ids, self.lora_A.T) @ self.lora_B.T) * SCALING


class LinearWithLora(nn.Linear):
    """The structure of loralib's: a Linear that also holds the adapter."""

    def __init__(self, merged: bool) -> None:
        super().__init__(6, 6)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(RANK, 6)), nn.Parameter(torch.randn(6, RANK))
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.lora_A.T @ self.lora_B.T


class WeightWithLora(nn.Module):
    """The structure of torchtune's: the weight itself beside an adapter of Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_parameter("bias", None)
        self.lora_a, self.lora_b = nn.Linear(6, RANK, bias=False), nn.Linear(RANK, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.lora_b(self.lora_a(x))


class ScaledLinear(nn.Module):
    """The structure of an (IA)^3 layer: merging scales the weight, and knows of no bias."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.base_layer, self.gain = nn.Linear(6, 6, bias=bias), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.gain


class Saved(nn.Module):
    """The structure of PEFT's ``modules_to_save``: a trained copy beside the original."""

    def __init__(self) -> None:
        super().__init__()
        self.original_module, self.copy = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(x)


class WithBackup(nn.Module):
    """A layer that is used, and another state of it in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("backup", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def forward_fold(layer: nn.Module) -> nn.Module:
    return net(lambda m, x: torch.tanh(m.layer(m.norm(x.sin()))), norm=norm(), layer=layer)


def backward_fold(layer: nn.Module) -> nn.Module:
    return net(lambda m, x: torch.tanh(m.norm(m.layer(x))), layer=layer, norm=norm())


def switched_off(layer: LoraLinear) -> LoraLinear:
    layer.active = False
    return layer


def merged(layer: LoraLinear) -> LoraLinear:
    layer.merge()
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "active": (lambda: LoraLinear(nn.Linear(6, 6)), "layer is a LoraLinear that adds a low-rank update to a layer"),
    "no bias": (lambda: LoraLinear(nn.Linear(6, 6, bias=False)), "layer is a LoraLinear that adds a low-rank update"),
    "merged": (
        lambda: merged(LoraLinear(nn.Linear(6, 6))),
        "layer is a LoraLinear whose layer.lora_A.default.weight the forward does not read; merge adapters first",
    ),
    "switched off": (lambda: switched_off(LoraLinear(nn.Linear(6, 6))), "does not read; merge adapters first"),
    "several": (lambda: LoraLinear(nn.Linear(6, 6), ("default", "other")), "layer.lora_A.other.weight"),
    "in a Sequential": (lambda: nn.Sequential(LoraLinear(nn.Linear(6, 6)), nn.Dropout(0.1)), "layer.0 is a LoraLinear"),
    "subclass": (lambda: LinearWithLora(merged=False), "layer is a LinearWithLora that also holds lora_A"),
    "subclass, merged": (lambda: LinearWithLora(merged=True), "layer is a LinearWithLora that also holds lora_A"),
    "weight and Linears": (WeightWithLora, "layer is a WeightWithLora that adds a low-rank update to a layer"),
    "saved copy": (Saved, "layer is a Saved whose layer.original_module.weight the forward does not read"),
    "backup": (WithBackup, "layer is a WithBackup whose layer.backup the forward does not read"),
}


@pytest.mark.parametrize("place", [forward_fold, backward_fold])
@pytest.mark.parametrize(("build", "why"), LAYERS.values(), ids=LAYERS)
def test_a_layer_that_holds_more_keeps_the_norm(build: Callable[[], nn.Module], why: str, place: Any) -> None:
    assert why in reason(place(build()))


@pytest.mark.parametrize("place", [forward_fold, backward_fold])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_merging_and_unmerging_after_fuse_computes_what_it_did_before(place: Any, bias: bool) -> None:
    model = place(LoraLinear(nn.Linear(6, 6, bias=bias)))
    result, _ = fused(model, X)
    for sign in (1, -1):
        model.layer.merge(sign)
        result.layer.merge(sign)
        assert_same_outputs(model, result, (X,))


def test_a_norm_folds_once_adapters_are_merged_for_good() -> None:
    model = forward_fold(LoraLinear(nn.Linear(6, 6)))
    model.layer.merge()
    model.layer = model.layer.base_layer
    assert fused(model, X)[1]["norm"].action == "forward"


def test_an_adapter_of_another_layer_bars_nothing() -> None:
    model = net(
        lambda m, x: m.lora(torch.tanh(m.plain(m.norm(x)))),
        norm=norm(),
        plain=nn.Linear(6, 6),
        lora=LoraLinear(nn.Linear(6, 6)),
    )
    assert fused(model, X)[1]["norm"].into == ("plain",)


def test_adapters_of_convolutions_and_tables_keep_the_norm() -> None:
    conv = net(lambda m, x: torch.tanh(m.norm(m.layer(x))), layer=LoraConv(nn.Conv2d(6, 6, 1)), norm=norm(6, 1))
    assert "layer is a LoraConv that adds a low-rank update" in reason(conv, tokens(2, 6, 5, 5))
    table = net(lambda m, ids: torch.tanh(m.norm(m.layer(ids))), layer=LoraEmbedding(nn.Embedding(9, 6)), norm=norm())
    assert "layer is a LoraEmbedding that adds a low-rank update" in reason(table, torch.arange(8).view(2, 4))


def test_a_wrapper_that_scales_its_layer_gets_no_bias_that_it_did_not_have() -> None:
    assert fused(forward_fold(ScaledLinear(bias=True)), X)[1]["norm"].into == ("layer.base_layer",)
    why = "layer is a ScaledLinear with weights beside layer.base_layer, which gets no bias there"
    assert why in reason(forward_fold(ScaledLinear(bias=False)))


def test_a_nonlinear_adapter_is_a_layer_like_any_other() -> None:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.up(torch.relu(self.down(x)))

    assert fused(forward_fold(Bottleneck()), X)[1]["norm"].into == ("layer.layer", "layer.down")


class Chosen(nn.Module):
    """One of several norms: PEFT's trained copy, or one for each kind of input."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.number = nn.ModuleList([norm(), norm()]), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[self.number](x)


def test_a_norm_that_is_chosen_among_others_stays() -> None:
    model = net(lambda m, x: m.layer(m.choice(x)), choice=Chosen(), layer=nn.Linear(6, 6))
    result, report = fused(model, X)
    why = "choice is a Chosen whose choice.norms.1.weight the forward does not read; merge adapters, or give an example"
    assert report["choice.norms.0"].reason.startswith(why)
    for one in (model, result):
        one.choice.number = 1
    assert_same_outputs(model, result, (X,))


def test_a_norm_in_a_container_of_its_own_folds() -> None:
    model = net(lambda m, x: m.layer(m.choice(x)), choice=nn.Sequential(norm()), layer=nn.Linear(6, 6))
    assert fused(model, X)[1]["choice.0"].action == "forward"


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


@pytest.mark.parametrize("how", [Double(), Flip()], ids=["computed", "moved"])
@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("place", [forward_fold, backward_fold])
def test_a_parametrized_weight_or_bias_keeps_the_norm(place: Any, tensor: str, how: nn.Module) -> None:
    model = place(nn.Linear(6, 6))
    parametrize.register_parametrization(model.layer, tensor, how).eval()
    result, report = fused(model, X)
    assert report["norm"].action == "kept"
    expected = model(X)
    parametrize.remove_parametrizations(result.layer, tensor)
    assert torch.allclose(result(X), expected, rtol=1e-9, atol=1e-9)


WRAPS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.3),
    "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("place", [forward_fold, backward_fold])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_weights_that_are_computed_from_others_keep_the_norm(wrap: Any, place: Any) -> None:
    model = place(wrap(nn.Linear(6, 6)))
    result, report = fuse(model, X)
    assert Reason.COMPUTED_WEIGHT in report["norm"].codes
    before = copy.deepcopy(dict(model.layer.named_parameters()))
    assert all(torch.equal(value, before[name]) for name, value in result.layer.named_parameters())
    assert_same_outputs(model, result, (X,))
