"""What converting leaves of a model: names, ties, modes, hooks; and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm.layers
import torch
from torch import nn

from slabformer import PRepBN, ProgressiveSchedule, RepBN, blended, convert_norms_, fit_norms_
from slabformer.nn.controls import prepbn_modules
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close

C = 8
TOKENS, MAPS = (2, 5, C), (2, C, 4, 3)


def block() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.RMSNorm(C))


def test_names_come_in_the_models_order_and_filter_sees_module_and_name() -> None:
    seen = []

    def keep(module: nn.Module, name: str) -> bool:
        seen.append((type(module).__name__, name))
        return name != "1.0"

    model = nn.Sequential(block(), block())
    assert convert_norms_(model, filter=keep) == ["0.0", "0.2", "1.2"]
    assert seen == [("LayerNorm", "0.0"), ("RMSNorm", "0.2"), ("LayerNorm", "1.0"), ("RMSNorm", "1.2")]
    assert isinstance(model[1][0], nn.LayerNorm)


def test_module_under_several_names_stays_one() -> None:
    norm, shared = nn.LayerNorm(C), block()
    model = nn.ModuleDict({"a": norm, "b": norm, "c": shared, "d": shared})
    assert convert_norms_(model) == ["a", "b", "c.0", "c.2", "d.0", "d.2"]
    assert model["a"] is model["b"]
    assert model["c"][0] is model["d"][0]
    assert len(prepbn_modules(model)) == 3


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.LayerNorm(C), nn.LayerNorm(C))
    model[1].weight = model[0].weight
    convert_norms_(model)
    assert model[0].norm.weight is model[1].norm.weight
    assert model[0].rep.weight is model[1].rep.weight
    assert model[0].rep.bias is not model[1].rep.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no_affine"])
def test_dtype_is_kept(dtype: torch.dtype, affine: bool) -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C, elementwise_affine=affine)).to(dtype)
    x = torch.randn(TOKENS, dtype=dtype)
    expected = model(x)
    convert_norms_(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model[1].rep.running_var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(model(x), expected, EXACT)
    model[1].set_gamma(0.5)
    assert model(x).dtype == dtype


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no_affine"])
def test_device_is_kept(affine: bool) -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C, elementwise_affine=affine)).to("meta")
    convert_norms_(model)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_mode_of_each_module_is_kept() -> None:
    model = nn.Sequential(block(), block().eval())
    convert_norms_(model)
    for part, mode in zip(model, (True, False), strict=True):
        assert {module.training for module in part.modules()} == {mode}


def test_weights_are_the_same_objects() -> None:
    model = block()
    weight = model[0].weight
    convert_norms_(model)
    assert model[0].norm.weight is weight


def test_hooks_stay_on_their_name_in_every_phase_and_can_be_removed() -> None:
    model, calls = block(), []
    handles = [
        model[0].register_forward_hook(lambda module, args, output: calls.append(type(module).__name__)),
        model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda module, grads, outs: calls.append("backward")),
    ]
    convert_norms_(model)
    for gamma in (1.0, 0.5, 0.0):
        calls.clear()
        model[0].set_gamma(gamma)
        model(torch.randn(TOKENS, requires_grad=True)).sum().backward()
        assert calls == ["before", "PRepBN", "backward"]
    calls.clear()
    model.eval()(torch.randn(TOKENS))
    assert calls == ["before", "PRepBN"]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(TOKENS))
    assert not calls


class Uncopyable:
    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Stands for a trainer with open files."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


def test_hooks_are_not_copied_to_look_at_a_norm() -> None:
    model = block()
    model[0].register_forward_hook(Uncopyable().hook)
    assert convert_norms_(model) == ["0", "2"]


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(ValueError, match="no LayerNorm or RMSNorm to convert in Linear"):
        convert_norms_(nn.Linear(C, C))
    with pytest.raises(ValueError, match="the filter refused all 2"):
        convert_norms_(block(), filter=lambda module, name: False)


@pytest.mark.parametrize("progressive", [True, False])
def test_second_conversion_is_an_error_and_changes_nothing(progressive: bool) -> None:
    model = block()
    convert_norms_(model, norm="prepbn" if progressive else "repbn")
    before = list(model.named_modules())
    with pytest.raises(ValueError, match="of ours already"):
        convert_norms_(model)
    assert list(model.named_modules()) == before


@pytest.mark.parametrize("norm", [lambda: PRepBN(C), lambda: RepBN(C)], ids=["PRepBN", "RepBN"])
def test_norm_of_ours_alone_is_an_error(norm: Any) -> None:
    model = norm()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match="of ours already"):
        convert_norms_(model)
    assert list(model.named_modules()) == before


def test_model_that_is_a_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match="the model itself is a LayerNorm; wrap it"):
        convert_norms_(nn.LayerNorm(C))


def test_later_conversion_takes_what_the_first_left() -> None:
    model = block()
    convert_norms_(model, filter=lambda module, name: name == "0")
    assert convert_norms_(model) == ["2"]
    assert isinstance(model[0].norm, nn.LayerNorm)


@pytest.mark.parametrize(
    "settings", [{"eta": "one"}, {"filter": lambda m, n: 1 / (n == "0")}], ids=["setting", "filter"]
)
def test_an_error_leaves_nothing_half_converted(settings: dict[str, Any]) -> None:
    model = block()
    before = list(model.named_modules())
    with pytest.raises((ValueError, ZeroDivisionError)):
        convert_norms_(model, **settings)
    assert list(model.named_modules()) == before


def test_settings_reach_repbn() -> None:
    model = block()
    convert_norms_(model, eta=0.25, eps=1e-3, momentum=None)
    assert model[0].rep.eta == 0.25
    assert model[0].rep.eps == 1e-3
    assert model[0].rep.momentum is None
    assert model[0].eps == 1e-5


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("padding", [False, True], ids=["no_padding", "padding"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # torch's own advice on norm_first
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torch_encoder_in_inference_mode_takes_no_fast_path(norm_first: bool, padding: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(C, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(C)).eval()
    x = torch.randn(3, 5, C)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padding else None
    plain = copy.deepcopy(model)
    names = convert_norms_(model)
    assert len(names) == 5
    with torch.inference_mode(), blended(model):
        assert_close(
            model(x, src_key_padding_mask=mask)[0], plain(x, src_key_padding_mask=mask)[0], FLOAT32
        )  # the first sentence has no padding
    fit_norms_(model, [x])
    slow = model(x, src_key_padding_mask=mask)
    assert slow.requires_grad
    with torch.inference_mode():
        assert_close(model(x, src_key_padding_mask=mask), slow, FLOAT32)


def test_converted_vision_transformer_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    assert convert_norms_(model) == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    with blended(model):
        assert_close(model(x), expected, ALGEBRA)
    ProgressiveSchedule(model, 10, warmup=0.1)
    assert_close(model.train()(x), expected, ALGEBRA)
