"""RepBN and PRepBN as other libraries treat norms: parameter groups, frozen statistics, rebuilt BatchNorms, casts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm.layers
import timm.utils
import torch
from timm.optim import param_groups_weight_decay
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.ops._utils import split_normalization_params

from distributed import run_ranks
from slabformer import PRepBN, RepBN, convert_norms_, norm_parameters, recalibrate_
from slabformer.nn.controls import repbn_modules
from tolerances import EXACT, FLOAT32, assert_close

C = 6
BATCHES = [torch.randn(n, 5, C, generator=torch.Generator().manual_seed(n)) * 3 + n for n in (4, 4, 2)]
REBUILDERS = [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm]


def faded() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(C, C), PRepBN(C), nn.Linear(C, C), RepBN(C, eta=0.3), nn.Linear(C, C))
    net[1].set_gamma(0)
    return net


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("wrap", [lambda net: net, AveragedModel], ids=["model", "average"])
def test_update_bn_gives_the_population_statistics_that_recalibrate_gives(
    wrap: Callable[[nn.Module], nn.Module], momentum: float | None
) -> None:
    ours, theirs = faded(), wrap(faded())
    theirs.load_state_dict(wrap(ours).state_dict())
    for norm in repbn_modules(theirs).values():
        norm.momentum = momentum
    recalibrate_(ours, BATCHES)
    update_bn(BATCHES, theirs)
    for norm, expected in zip(repbn_modules(theirs).values(), repbn_modules(ours).values(), strict=True):
        assert_close(norm.running_mean, expected.running_mean, FLOAT32)
        assert_close(norm.running_var, expected.running_var, FLOAT32)
        assert norm.momentum == momentum
        assert norm.num_batches_tracked == len(BATCHES)


def test_update_bn_reaches_a_norm_whose_layer_norm_has_not_begun_to_fade() -> None:
    net = nn.Sequential(PRepBN(C))
    update_bn(BATCHES, net)
    tokens = torch.cat(BATCHES).flatten(0, 1)
    assert_close(net[0].rep.running_mean, tokens.mean(0), FLOAT32)
    assert_close(net[0].rep.running_var, tokens.var(0, correction=0), FLOAT32)


def test_momentum_is_followed_again_after_update_bn() -> None:
    norm = RepBN(C, momentum=0.25)
    update_bn(BATCHES, nn.Sequential(norm))
    before, x = norm.running_mean.clone(), torch.randn(8, 5, C)
    norm.train()(x)
    assert_close(norm.running_mean, 0.75 * before + 0.25 * x.mean((0, 1)), FLOAT32)


@pytest.mark.parametrize("convert", REBUILDERS, ids=["torch", "timm"])
def test_converting_to_sync_batch_norm_keeps_every_prepbn_and_shares_its_statistics(
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    net = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Flatten(2), nn.Linear(4, C), PRepBN(C)).eval()
    nn.init.constant_(net[4].rep.eta, 0.4)
    x = torch.randn(2, 3, 2, 2)
    expected, names = net(x), list(net.state_dict())
    converted = convert(net)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert converted[4].rep.sync is not None
    assert list(converted.state_dict()) == names
    assert_close(converted(x), expected, EXACT)


@pytest.mark.parametrize("convert", REBUILDERS, ids=["torch", "timm"])
@pytest.mark.parametrize("wrap", [lambda norm: norm, nn.Sequential], ids=["alone", "in a model"])
def test_a_repbn_that_would_lose_eta_is_refused(
    convert: Callable[[nn.Module], nn.Module], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    with pytest.raises(TypeError, match=r"lose eta.*call slabformer.sync_norms_"):
        convert(wrap(RepBN(C)))


def test_no_other_norm_takes_the_place_of_rep() -> None:
    with pytest.raises(TypeError, match="must stay a RepBN, got GroupNorm"):
        PRepBN(C).add_module("rep", nn.GroupNorm(2, C))


def test_a_loop_over_batch_norms_freezes_the_statistics() -> None:
    net = faded().train()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    expected = copy.deepcopy(net).eval()(BATCHES[0])
    assert_close(net(BATCHES[0]), expected, FLOAT32)
    for name, buffer in net.named_buffers():
        assert_close(buffer, before[name], EXACT)


def test_timm_freezes_parameters_and_leaves_norms_what_they_are() -> None:
    net = faded()
    timm.utils.freeze(net)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    freeze_batch_norm_2d(net)
    assert [type(net[1].rep), type(net[3])] == [RepBN, RepBN]


def test_parameter_groups_of_other_libraries_spare_gain_offset_and_eta() -> None:
    net = faded()
    own = {id(parameter) for parameter in norm_parameters(net).values()}
    assert len(own) == 8  # gain and offset of the LayerNorm; gain, offset and eta of both RepBNs
    norms, _ = split_normalization_params(net)
    assert own == {id(parameter) for parameter in norms}
    decayed = [p for group in param_groups_weight_decay(net, 0.1) if group["weight_decay"] for p in group["params"]]
    assert not own & {id(parameter) for parameter in decayed}


def test_norm_parameters_have_the_names_of_the_model() -> None:
    net = faded()
    names = dict(net.named_parameters())
    assert all(names[name] is parameter for name, parameter in norm_parameters(net).items())
    assert set(norm_parameters(net[3])) == {"weight", "bias", "eta"}


def test_a_norm_without_running_statistics_uses_those_of_the_batch() -> None:
    net = replace_all_batch_norm_modules_(faded())
    x = BATCHES[0]
    assert_close(net.eval()(x), net.train()(x), FLOAT32)
    reference = replace_all_batch_norm_modules_(nn.Sequential(nn.BatchNorm1d(C))).eval()
    alone = replace_all_batch_norm_modules_(RepBN(C, eta=0.0)).eval()
    assert_close(alone(x), reference(x.mT).mT, FLOAT32)


def test_functional_call_computes_with_the_given_tensors() -> None:
    net = faded().eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["3.eta"] += 1
    assert_close(functional_call(net[:4], {k: v for k, v in state.items() if k[0] in "0123"}, BATCHES[0]),
                 net[:4](BATCHES[0]) + net[:3](BATCHES[0]), FLOAT32)  # fmt: skip


def test_tracing_and_listing_attributes_do_not_ask_for_what_is_refused() -> None:
    norm = RepBN(C)
    assert "affine" not in dir(norm)
    assert (norm.num_features, norm.track_running_stats, norm.eps, norm.momentum) == (C, True, 1e-5, 0.1)


def half(net: nn.Module) -> nn.Module:
    return net.half()


def narrowed_behind_our_back(net: nn.Module) -> nn.Module:
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.half()
    return net


def assigned(net: nn.Module) -> nn.Module:
    state = {name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": half,
    "bfloat16": lambda net: net.bfloat16(),
    "to": lambda net: net.to("cpu", torch.float16),
    "type": lambda net: net.type(torch.bfloat16),
    "back and forth": lambda net: net.half().double().bfloat16(),
    "assign": assigned,
    "data": narrowed_behind_our_back,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_statistics_outgrow_float16_in_a_model_of_half_precision(cast: Callable[[nn.Module], nn.Module]) -> None:
    net = cast(nn.Sequential(PRepBN(C, momentum=None), RepBN(C, momentum=None, eta=0.0)))
    net[0].set_gamma(0)
    dtype = net[1].weight.dtype
    assert dtype in (torch.float16, torch.bfloat16)
    x = (400 * torch.randn(8, 16, C)).to(dtype)
    net[0].train()(x)
    assert net[0].rep.running_var.dtype == torch.float32
    assert_close(net[0].rep.running_var, x.float().flatten(0, 1).var(0), FLOAT32)
    assert net[0].eval()(x).isfinite().all()


def test_casting_keeps_the_digits_of_the_statistics() -> None:
    norm = RepBN(C)
    norm.running_mean.copy_(1000 + torch.rand(C))
    before = norm.running_mean.clone()
    assert_close(norm.bfloat16().half().float().running_mean, before, EXACT)


def test_gamma_keeps_its_small_steps_in_a_model_of_half_precision() -> None:
    norm = PRepBN(C).bfloat16()
    norm.set_gamma(0.9995)
    assert_close(norm.gamma, torch.tensor(0.9995), EXACT)
    assert norm.phase == "fading"
    assert_close(norm.half().gamma, torch.tensor(0.9995), EXACT)
    assert assigned(norm).gamma.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_of_running_statistics_are_not_rounded_away(dtype: torch.dtype) -> None:
    norm = RepBN(C, momentum=0.01, dtype=dtype)
    x = (5 + torch.randn(64, 16, C)).to(dtype)
    for _ in range(1000):
        norm.observe(x)
    assert_close(norm.running_mean, x.float().mean((0, 1)), 1e-4)  # 0.99 ** 1000 of the start is left


def test_a_short_default_dtype_leaves_statistics_in_float32() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        norm = PRepBN(C)
    finally:
        torch.set_default_dtype(torch.float32)
    assert norm.rep.weight.dtype == torch.bfloat16
    assert norm.rep.running_var.dtype == torch.float32


def test_float64_models_keep_float64_statistics() -> None:
    assert RepBN(C, dtype=torch.float64).running_var.dtype == torch.float64
    assert RepBN(C).double().running_var.dtype == torch.float64


def test_casts_on_the_meta_device_leave_float32() -> None:
    norm = nn.Sequential(RepBN(C, device="meta")).half().to_empty(device="cpu")[0]
    assert norm.running_var.dtype == torch.float32
    assert norm.weight.dtype == torch.float16


def test_a_missing_counter_is_still_missed() -> None:
    state = RepBN(C).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        RepBN(C).load_state_dict(dict(state))


def test_converted_models_are_seen_too() -> None:
    net = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.LayerNorm(C))
    convert_norms_(net)
    assert sum(isinstance(module, _BatchNorm) for module in net.modules()) == 2
    assert len(norm_parameters(net)) == 10


def sharded_rank(rank: int, num_ranks: int) -> list[object]:
    net = nn.Sequential(nn.Linear(C, C), RepBN(C, momentum=None, eta=0.0))
    nn.init.eye_(net[0].weight)
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, output_dtype=torch.float32)
    fully_shard(net, mesh=init_device_mesh("cpu", (num_ranks,)), mp_policy=policy)
    x = 400 * torch.randn(8, 4, C)
    net(x).sum().backward()
    return [net[1].running_var, x.half().float().flatten(0, 1).var(0)]


def test_sharded_parameters_of_float16_leave_statistics_in_float32(tmp_path: Path) -> None:
    for var, expected in run_ranks(sharded_rank, tmp_path):
        assert var.dtype == torch.float32
        assert_close(var, expected, 1e-2)  # of float16 products
