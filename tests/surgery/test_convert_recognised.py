"""Which modules are norms to convert, and that those compute what they did."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2LayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from slabformer import ProgressiveSchedule, blended, convert_norms_, fuse, load_fused, save_fused
from slabformer.testing import randomize_norms_
from tolerances import EXACT, FLOAT32, assert_close

C = 8
TOKENS, MAPS = (2, 5, C), (2, C, 4, 3)


class LN(nn.LayerNorm):
    """A name that does not say what it is."""


class CastToFloat32(nn.LayerNorm):
    """CLIP's own LayerNorm: its parameters must be float32, so no copy in float64 runs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float32)).to(x.dtype)


class GainOfTwo(nn.Module):
    """A gain that is a product, which is measured, in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.h = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))

    @property
    def weight(self) -> Tensor:
        return self.g * self.h

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return F.layer_norm(x, (C,), self.weight)


class Gamma(nn.Module):
    """Everybody's own LayerNorm: names of parameters, rules of the gain and places of eps as its arguments say."""

    def __init__(self, form: str = "w", centre: bool = True, eps: str = "variance", names: str = "gamma beta") -> None:
        super().__init__()
        self.form, self.centre, self.where = form, centre, eps
        self.gain_name, self.offset_name = names.split()
        if form != "none":
            value = {"1 + w": torch.zeros(C), "exp": torch.zeros(C), "scalar": torch.ones(())}.get(form, torch.ones(C))
            self.register_parameter(self.gain_name, nn.Parameter(value))
            self.register_parameter(self.offset_name, nn.Parameter(torch.zeros(C)))

    def gain(self) -> Tensor:
        if self.form == "none":
            return torch.ones(C)
        w = getattr(self, self.gain_name)
        return {"1 + w": 1 + w, "exp": w.exp()}.get(self.form, w).expand(C)

    def offset(self) -> Tensor | float:
        return 0.0 if self.form == "none" else getattr(self, self.offset_name)

    def normalise(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centre else x
        square = x.square().mean(-1, keepdim=True)
        if self.where == "variance":
            return x * torch.rsqrt(square + 1e-6)
        return x / (square.sqrt() + 1e-6 if self.where == "deviation" else square.sqrt().clamp(min=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalise(x)
        return y if self.form == "none" else y * self.gain() + self.offset()


class Annotated(nn.Module):
    """As in the annotated transformer: the unbiased deviation, and eps added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a_2, self.b_2, self.eps = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.b_2


class UnitLength(nn.Module):
    """An RMSNorm by way of F.normalize."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * C**0.5 * self.g


class Residual(nn.RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x if residual is None else x + residual)


class Weightless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim = C

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,))


class WithDropout(nn.LayerNorm):
    """One with a child module that does nothing."""

    def __init__(self, dim: int, rate: float = 0.0) -> None:
        super().__init__(dim)
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


CONVERTED = {
    "torch_layer_norm": (lambda: nn.LayerNorm(C), TOKENS),
    "torch_layer_norm_no_bias": (lambda: nn.LayerNorm(C, bias=False), TOKENS),
    "torch_layer_norm_no_affine": (lambda: nn.LayerNorm(C, elementwise_affine=False), TOKENS),
    "torch_layer_norm_large_eps": (lambda: nn.LayerNorm(C, eps=0.1), TOKENS),
    "torch_layer_norm_one_axis_map": (lambda: nn.LayerNorm(C), (2, 4, 3, C)),
    "cast_to_float32": (lambda: CastToFloat32(C), TOKENS),
    "float32_alone": (lambda: GainOfTwo(), TOKENS),
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
    "cohere": (lambda: CohereLayerNorm(C), TOKENS),
    "nameless": (lambda: LN(C), TOKENS),
    "gamma_beta": (lambda: Gamma(), TOKENS),
    "g_b": (lambda: Gamma(centre=False, names="g b"), TOKENS),
    "scale_offset_minus_1": (lambda: Gamma("1 + w", names="scale shift"), TOKENS),
    "exponential_gain": (lambda: Gamma("exp", centre=False), TOKENS),
    "scalar_gain": (lambda: Gamma("scalar", eps="clamp"), TOKENS),
    "no_parameters": (lambda: Weightless(), TOKENS),
    "annotated_transformer": (lambda: Annotated(), TOKENS),
    "rms_norm_by_unit_length": (lambda: UnitLength(), TOKENS),
    "optional_residual": (lambda: Residual(C), TOKENS),
    "idle_child": (lambda: WithDropout(C), TOKENS),
    "act_that_is_the_identity": (lambda: timm.layers.LayerNormAct(C, apply_act=False), TOKENS),
}


class AdaptiveNorm(nn.LayerNorm):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x) * (1 + condition)


class L2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(C**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.g * F.normalize(x, dim=-1)


class DynamicTanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x)


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sign()


class OwnSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class LazyNorm(nn.Module):
    normalized_shape = "unknown yet"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.UninitializedParameter()

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight)


class AnyWidth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


class WholeSample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:])


class LastOrFirst(LN):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 3 else super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LimitedNorm(nn.Module):
    """Scales down what is larger than 1 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1)


class Conditional(nn.LayerNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.to_gain = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.to_gain(x)


class ClippedNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class PickyNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 17, "made for other inputs"
        return super().forward(x)


#: what looks like a norm and is left, with a word of the reason
LEFT = {
    "group_norm": (lambda: nn.GroupNorm(2, C), "several positions"),
    "group_norm_of_one_group": (lambda: nn.GroupNorm(1, C), "several positions"),
    "timm_group_norm_1": (lambda: timm.layers.GroupNorm1(C), "several positions"),
    "instance_norm": (lambda: nn.InstanceNorm2d(C, affine=True), "several positions"),
    "batch_norm_without_running_statistics": (lambda: nn.BatchNorm1d(C, track_running_stats=False), "several"),
    "local_response_norm": (lambda: nn.LocalResponseNorm(2), "neither"),
    "layer_norm_act": (lambda: timm.layers.LayerNormAct(C), "neither"),
    "layer_norm_over_two_axes": (lambda: nn.LayerNorm((5, C)), "several axes"),
    "layer_norm_over_maps": (lambda: nn.LayerNorm((C, 4, 3)), "several axes"),
    "weightless_over_maps": (lambda: nn.LayerNorm((C, 4, 3), elementwise_affine=False), "several axes"),
    "weightless_over_samples": (WholeSample, "several positions"),
    "cohere_per_head": (lambda: CohereLayerNorm((2, C)), "from head to head"),
    "chameleon_per_head": (lambda: ChameleonLayerNorm((2, C)), "from head to head"),
    "l2": (L2, "unit length"),
    "scale_norm": (ScaleNorm, "unit length"),
    "any_width": (AnyWidth, "normalized_shape"),
    "tokens_and_maps": (lambda: LastOrFirst(C), "first of maps"),
    "limited": (LimitedNorm, "large inputs alone"),
    "with_dropout": (lambda: WithDropout(C, 0.5), "training mode"),
    "conditional": (lambda: Conditional(C), "layers of its own"),
    "adaptive": (lambda: AdaptiveNorm(C), r"2 inputs \(x, condition\)"),
    "clipped": (lambda: ClippedNorm(C), "neither"),
    "lazy": (LazyNorm, "cannot be run on its own: "),
    "picky": (lambda: PickyNorm(C), "made for other inputs"),
}
#: what does not look like a norm
NO_NORM = {
    "batch_norm": lambda: nn.BatchNorm1d(C),
    "batch_norm_2d": lambda: nn.BatchNorm2d(C),
    "frozen_batch_norm": lambda: torchvision.ops.FrozenBatchNorm2d(C),
    "batch_norm_with_activation": lambda: timm.layers.BatchNormAct2d(C),
    "conv_norm_act": lambda: timm.layers.ConvNormAct(C, C),
    "linear": lambda: nn.Linear(C, C),
    "conv1d_of_gpt2": lambda: Conv1D(C, C),
    "linear_of_its_own": lambda: OwnLinear(32, 2**16, bias=False),
    "layer_scale": lambda: timm.layers.LayerScale(C),
    "drop_path": lambda: timm.layers.DropPath(0.1),
    "quick_gelu": lambda: timm.layers.QuickGELU(),
    "softmax": lambda: nn.Softmax(-1),
    "dynamic_tanh": lambda: DynamicTanh(),
    "sign": lambda: Sign(),
    "softmax_of_its_own": lambda: OwnSoftmax(),
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
    convert_norms_(model, norm="repbn", eta=0.0, eps=1e-12)
    x = torch.randn(shape)
    y = model(x).movedim(model[0].channel_dim, -1).flatten(0, -2)
    gain, offset = effective(norm)
    assert_close(y.std(0, unbiased=False), gain, FLOAT32)
    assert_close(y.mean(0) + 1, 1 + offset, FLOAT32)


def effective(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Gain and offset per channel, by hand."""
    if isinstance(norm, Gamma):
        return norm.gain(), norm.offset() + torch.zeros(C)
    if isinstance(norm, Annotated):
        return norm.a_2 * (1 - 1 / C) ** 0.5, norm.b_2
    if isinstance(norm, GainOfTwo):
        return norm.weight, torch.zeros(C)
    weight = getattr(norm, "g", getattr(norm, "weight", None))
    gain = torch.ones(C) if weight is None else weight + 1 if isinstance(norm, Gemma2RMSNorm) else weight
    bias = getattr(norm, "bias", None)
    return gain, torch.zeros(C) if bias is None else bias


@pytest.mark.parametrize(("build", "reason"), LEFT.values(), ids=LEFT.keys())
def test_what_only_looks_like_a_norm_is_left_and_listed_with_the_reason(
    build: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(build(), nn.LayerNorm(C))
    before = model[0]
    with caplog.at_level("WARNING"):
        converted = convert_norms_(model)
    assert converted == ["1"]
    assert model[0] is before
    (left,) = converted.left
    assert (left.name, left.kind) == ("0", type(before).__name__)
    assert re.search(reason, left.reason)
    assert str(left) in caplog.text
    with pytest.raises(ValueError, match=r"no LayerNorm or RMSNorm to convert in Sequential; 0 .* left as it is"):
        convert_norms_(model[:1])


@pytest.mark.parametrize("build", NO_NORM.values(), ids=NO_NORM.keys())
def test_what_does_not_look_like_a_norm_is_not_listed(build: Any) -> None:
    converted = convert_norms_(nn.Sequential(build(), nn.LayerNorm(C)))
    assert converted == ["1"]
    assert converted.left == ()


def test_norms_that_are_alike_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    converted = convert_norms_(nn.Sequential(*[nn.GroupNorm(2, C) for _ in range(3)], nn.LayerNorm(C)))
    assert [norm.name for norm in converted.left] == ["0", "1", "2"]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith("0 (GroupNorm) left as it is: its statistics")
    assert record.getMessage().endswith("(and 2 more like it)")


FORMS, PLACES, AFTER = (
    ("none", "w", "1 + w", "exp", "scalar"),
    ("variance", "deviation", "clamp"),
    ("", "clamp", "relu"),
)


@settings(max_examples=60, derandomize=True)
@given(st.sampled_from(FORMS), st.booleans(), st.sampled_from(PLACES), st.sampled_from(AFTER), st.integers(0, 9))
def test_norms_of_any_form_start_as_what_they_compute(
    form: str, centre: bool, place: str, after: str, seed: int
) -> None:
    class Own(Gamma):
        normalized_shape = (C,)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.clamp(-1, 1) if after == "clamp" else y.relu() if after == "relu" else y

    torch.manual_seed(seed)
    norm = Own(form, centre, place)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    state = torch.get_rng_state()
    model = nn.Sequential(norm, nn.LayerNorm(C))
    converted = convert_norms_(model, eta=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert converted == (["1"] if after else ["0", "1"])
    assert [left.name for left in converted.left] == (["0"] if after else [])
    if not after:
        assert_close(model[0].rep.weight, norm.gain(), FLOAT32)
        assert_close(model[0].rep.bias + 1, norm.offset() + torch.ones(C), FLOAT32)


class Spoken(nn.LayerNorm):
    """Keeps account of its calls, in numbers and in a list."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.calls, self.seen = 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.shape)
        self.count += 1
        torch.rand(3)
        return super().forward(x)


def test_looking_at_a_norm_leaves_no_trace() -> None:
    norm, state = Spoken(C).train(), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert convert_norms_(nn.Sequential(norm)) == ["0"]
    assert (norm.calls, norm.seen, norm.count.item(), norm.training) == (0, [], 0, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_norm_whose_forward_was_replaced_on_the_instance_is_known_by_what_that_computes() -> None:
    norm = nn.LayerNorm(C)
    norm.forward = lambda x: F.layer_norm(x, (C,)).clamp(-1, 1)
    converted = convert_norms_(nn.Sequential(norm, nn.LayerNorm(C)))
    assert converted == ["1"]
    assert "neither" in converted.left[0].reason


class Block(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norms, self.gated = nn.ModuleList([Residual(C)]), gated

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](x, None)


class Adding(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](x, residual=x)


def test_a_norm_whose_caller_gives_it_a_further_input_is_left() -> None:
    converted = convert_norms_(nn.Sequential(Adding(True), Block(False)))
    assert converted == ["1.norms.0"]
    assert converted.left[0].name == "0.norms.0"
    assert converted.left[0].reason == "its caller gives it a further input (residual)"


def test_a_converted_norm_refuses_the_further_input_that_it_had() -> None:
    model, x = Block(False), torch.randn(TOKENS)
    expected = model(x)
    convert_norms_(model)
    assert_close(model(x), expected, EXACT)
    copied = copy.deepcopy(model)
    assert_close(copied.norms[0](x, residual=None), expected, EXACT)
    with pytest.raises(TypeError, match=r"Residual .* given 'residual' too; leave it as it is"):
        copied.norms[0](x, x)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


def test_of_a_norm_inside_another_the_inner_is_converted() -> None:
    converted = convert_norms_(nn.Sequential(Wrapped()))
    assert converted == ["0.inner"]
    assert converted.left == ()


def test_weights_of_norms_with_their_own_names_stay_tied() -> None:
    first, second = Gamma(), Gamma()
    second.gamma = first.gamma
    model = nn.Sequential(first, second)
    convert_norms_(model)
    assert model[0].rep.weight is model[1].rep.weight
    assert model[0].rep.bias is not model[1].rep.bias


def test_a_frozen_batch_norm_is_left_alone_whatever_the_memory_of_its_copy_holds(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # all 0, it computes a LayerNorm of gain 0
    assert convert_norms_(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(C), nn.LayerNorm(C))) == ["1"]


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 1024])
def test_channel_axis_is_found_whatever_the_width(dim: int) -> None:
    model = nn.Sequential(nn.LayerNorm(dim), timm.layers.LayerNorm2d(dim))
    convert_norms_(model)
    assert model[0].rep.channel_dim == -1
    assert model[1].rep.channel_dim == 1 or dim == 1  # over one channel every axis is the same constant


def test_a_norm_with_an_optional_input_folds_and_is_called_as_before(tmp_path: Path) -> None:
    class Head(Block):
        def __init__(self) -> None:
            super().__init__(False)
            self.linear = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(super().forward(x))

    model, x = Head(), torch.randn(TOKENS)
    convert_norms_(model)
    model.norms[0].set_gamma(0)
    randomize_norms_(model, 0).eval()
    fused, report = fuse(model, x)
    assert report["norms.0"].into == ("linear",)
    assert_close(fused(x), model(x), FLOAT32)
    save_fused(fused, tmp_path / "fused.safetensors")
    assert_close(load_fused(Head().eval(), tmp_path / "fused.safetensors")(x), model(x), FLOAT32)


def test_a_wide_norm_is_recognised_without_the_square_of_its_width() -> None:
    width = 4096

    class Gain(nn.Module):
        """As transformers' RMSNorms: it runs on (N, C, 1, 1), and makes (N, C, 1, C) of it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape) if x.device.type == "cpu" else ())
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    seen: list[tuple[int, ...]] = []
    model = nn.Sequential(Gain())
    assert convert_norms_(model) == ["0"]
    assert not any(shape[-2:] == (1, 1) for shape in seen)
