"""Which modules are norms to convert, and that those compute what they did."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
import torchvision
from torch import Tensor, nn
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2LayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from slabformer import ProgressiveSchedule, blended, convert_norms_
from tolerances import EXACT, FLOAT32, assert_close

C = 8
TOKENS, MAPS = (2, 5, C), (2, C, 4, 3)

CONVERTED = {
    "torch_layer_norm": (lambda: nn.LayerNorm(C), TOKENS),
    "torch_layer_norm_no_bias": (lambda: nn.LayerNorm(C, bias=False), TOKENS),
    "torch_layer_norm_no_affine": (lambda: nn.LayerNorm(C, elementwise_affine=False), TOKENS),
    "torch_layer_norm_large_eps": (lambda: nn.LayerNorm(C, eps=0.1), TOKENS),
    "torch_layer_norm_one_axis_map": (lambda: nn.LayerNorm(C), (2, 4, 3, C)),
    "torch_rms_norm": (lambda: nn.RMSNorm(C), TOKENS),
    "torch_rms_norm_no_affine": (lambda: nn.RMSNorm(C, elementwise_affine=False), TOKENS),
    "timm_layer_norm": (lambda: timm.layers.LayerNorm(C), TOKENS),
    "timm_layer_norm_fp32": (lambda: timm.layers.LayerNormFp32(C), TOKENS),
    "timm_layer_norm_2d": (lambda: timm.layers.LayerNorm2d(C), MAPS),
    "timm_layer_norm_2d_fp32": (lambda: timm.layers.LayerNorm2dFp32(C), MAPS),
    "timm_rms_norm": (lambda: timm.layers.RmsNorm(C), TOKENS),
    "timm_rms_norm_2d": (lambda: timm.layers.RmsNorm2d(C), MAPS),
    "timm_simple_norm": (lambda: timm.layers.SimpleNorm(C), TOKENS),
    "timm_simple_norm_2d": (lambda: timm.layers.SimpleNorm2d(C), MAPS),
    "llama_rms_norm": (lambda: LlamaRMSNorm(C), TOKENS),
    "gemma2_rms_norm": (lambda: Gemma2RMSNorm(C), TOKENS),
    "t5_layer_norm": (lambda: T5LayerNorm(C), TOKENS),
    "convnextv2_channels_last": (lambda: ConvNextV2LayerNorm(C), (2, 4, 3, C)),
    "convnextv2_channels_first": (lambda: ConvNextV2LayerNorm(C, data_format="channels_first"), MAPS),
}


class AdaptiveNorm(nn.LayerNorm):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x) * (1 + condition)


class GatedNorm(nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class ClippedNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class PickyNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 17, "made for other inputs"
        return super().forward(x)


LEFT_ALONE = {
    "group_norm": lambda: nn.GroupNorm(2, C),
    "group_norm_of_one_group": lambda: nn.GroupNorm(1, C),
    "timm_group_norm_1": lambda: timm.layers.GroupNorm1(C),
    "batch_norm": lambda: nn.BatchNorm1d(C),
    "batch_norm_2d": lambda: nn.BatchNorm2d(C),
    "instance_norm": lambda: nn.InstanceNorm2d(C, affine=True),
    "local_response_norm": lambda: nn.LocalResponseNorm(2),
    "layer_norm_act": lambda: timm.layers.LayerNormAct(C),
    "layer_norm_over_two_axes": lambda: nn.LayerNorm((5, C)),
    "adaptive": lambda: AdaptiveNorm(C),
    "gated": lambda: GatedNorm(C),
    "clipped": lambda: ClippedNorm(C),
    "picky": lambda: PickyNorm(C),
    "linear": lambda: nn.Linear(C, C),
}


def randomize(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


@pytest.mark.parametrize(("build", "shape"), CONVERTED.values(), ids=CONVERTED.keys())
def test_norms_are_recognised_and_go_on_computing_what_they_did(build: Any, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Identity(), randomize(build()))
    x = 1 + torch.randn(shape)
    expected = model(x)
    assert convert_norms_(model) == ["1"]
    ProgressiveSchedule(model, 10, warmup=0.5, fade=0.5)
    assert_close(model(x), expected, EXACT)
    with blended(model):
        assert_close(model.eval()(x), expected, EXACT)
    model.train()[1].set_gamma(0.5)
    y = model(x)
    channels_first = model[1].rep.channel_dim == 1
    assert y.shape == x.shape
    assert channels_first == (shape == MAPS)
    assert y.isfinite().all()


@pytest.mark.parametrize(("build", "shape"), CONVERTED.values(), ids=CONVERTED.keys())
def test_gain_and_offset_become_the_start_of_repbn(build: Any, shape: tuple[int, ...]) -> None:
    norm = randomize(build())
    model = nn.Sequential(norm)
    convert_norms_(model, progressive=False, eta=0.0, eps=1e-12)
    x = torch.randn(shape)
    y = model(x).movedim(model[0].channel_dim, -1).flatten(0, -2)
    weight = getattr(norm, "weight", None)
    gain = torch.ones(C) if weight is None else weight + 1 if isinstance(norm, Gemma2RMSNorm) else weight
    assert_close(y.std(0, unbiased=False), gain, FLOAT32)
    assert_close(y.mean(0) + 1, torch.ones(C) + (0 if getattr(norm, "bias", None) is None else norm.bias), FLOAT32)


@pytest.mark.parametrize("build", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_is_no_layer_norm_is_left_alone(build: Any) -> None:
    model = nn.Sequential(build(), nn.LayerNorm(C))
    before = model[0]
    assert convert_norms_(model) == ["1"]
    assert model[0] is before


def test_a_frozen_batch_norm_is_left_alone_whatever_the_memory_of_its_copy_holds(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # all 0, it computes a LayerNorm of gain 0
    assert convert_norms_(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(C), nn.LayerNorm(C))) == ["1"]


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 1024])
def test_channel_axis_is_found_whatever_the_width(dim: int) -> None:
    model = nn.Sequential(nn.LayerNorm(dim), timm.layers.LayerNorm2d(dim))
    convert_norms_(model)
    assert model[0].rep.channel_dim == -1
    assert model[1].rep.channel_dim == 1 or dim == 1  # over one channel every axis is the same constant
