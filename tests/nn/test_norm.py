from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from slabformer import Affine, PRepBN, RepBN, blended, token_mask
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close

C = 6

LAYOUTS = {
    "one_token": ((4, 1, C), -1),
    "7_tokens": ((2, 7, C), -1),
    "197_tokens": ((2, 197, C), -1),
    "no_token_axis": ((16, C), -1),
    "map_channels_last_axis": ((2, 3, 5, C), -1),
    "map_channels_first": ((2, C, 3, 5), 1),
    "vectors_as_maps": ((16, C), 1),
}


def trained(channel_dim: int = -1, dtype: torch.dtype = torch.float64, dim: int = C) -> RepBN:
    torch.manual_seed(0)
    norm = RepBN(dim, channel_dim=channel_dim, eta=0.7, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.to(dtype)


def reference(norm: RepBN, x: Tensor) -> tuple[Tensor, nn.BatchNorm1d, Tensor]:
    """Output of ``nn.BatchNorm1d + eta * x`` in float64 on tokens ``(*, C)``, the BatchNorm, and its ``eta``."""
    bn = nn.BatchNorm1d(x.shape[-1], norm.eps, norm.momentum, dtype=torch.float64).train(norm.training)
    bn.load_state_dict({name: value.double() for name, value in norm.state_dict().items() if name != "eta"})
    eta = norm.eta.detach().double().requires_grad_()
    return bn(x.flatten(0, -2)).view(x.shape) + eta * x, bn, eta


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_repbn_is_batchnorm_plus_skip(shape: tuple[int, ...], channel_dim: int, training: bool) -> None:
    norm = trained(channel_dim).train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    expected, bn, eta = reference(norm, twin.movedim(channel_dim, -1))
    expected = expected.movedim(-1, channel_dim)
    actual = norm(x)
    grad = torch.randn_like(expected)
    actual.backward(grad)
    expected.backward(grad)
    assert_close(actual, expected, ALGEBRA)
    for ours, theirs in ((x, twin), (norm.weight, bn.weight), (norm.bias, bn.bias), (norm.eta, eta)):
        assert_close(ours.grad, theirs.grad, ALGEBRA)
    assert_close(norm.running_mean, bn.running_mean, ALGEBRA)
    assert_close(norm.running_var, bn.running_var, ALGEBRA)
    assert norm.num_batches_tracked == bn.num_batches_tracked == int(training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["as_input", "float32"])
def test_shorter_dtypes_lose_no_more_than_their_own_rounding(
    dtype: torch.dtype, parameters: str, training: bool
) -> None:
    norm = trained(dtype=dtype if parameters == "as_input" else torch.float32).train(training)
    x = (3 + torch.randn(4, 197, C)).to(dtype).requires_grad_()
    twin = x.detach().double().requires_grad_()
    expected, bn, eta = reference(norm, twin)
    actual = norm(x)
    grad = torch.randn_like(expected).to(dtype)
    actual.backward(grad)
    expected.backward(grad.double())
    tolerance = 8 * torch.finfo(dtype).eps  # one rounding of values up to some 5 times the root mean square
    assert actual.dtype == x.dtype
    assert x.grad.dtype == dtype
    pairs = [(actual, expected), (x.grad, twin.grad), (norm.weight.grad, bn.weight.grad), (norm.eta.grad, eta.grad)]
    for ours, theirs in pairs:
        assert_close(ours, theirs, max(tolerance, FLOAT32))
    assert_close(norm.running_mean, bn.running_mean, max(tolerance, FLOAT32))
    assert_close(norm.running_var, bn.running_var, max(tolerance, FLOAT32))


def test_half_precision_eval_does_not_round_scale_and_shift() -> None:
    norm = RepBN(C, eta=0.0, dtype=torch.bfloat16).eval()
    norm.running_mean.fill_(10)
    norm.running_var.fill_(0.125)
    x = (10 + 0.3 * torch.randn(4, 7, C)).bfloat16()
    assert_close(norm(x), (x.double() - 10) / (0.125 + norm.eps) ** 0.5, 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (1e4, 0.1), (-3.0, 1e-3)])
def test_large_mean_costs_no_more_digits_than_in_batchnorm(mean: float, std: float) -> None:
    torch.manual_seed(0)
    x = mean + std * torch.randn(16, 197, C)
    norm, bn = RepBN(C, eta=0.0), nn.BatchNorm1d(C)
    tokens = x.double().flatten(0, 1)
    exact = (tokens - tokens.mean(0)) / (tokens.var(0, unbiased=False) + norm.eps).sqrt()
    ours = (norm(x).flatten(0, 1) - exact).abs().max()
    theirs = (bn(x.flatten(0, 1)) - exact).abs().max()
    assert ours <= max(theirs, torch.tensor(1e-5))
    assert_close(norm.running_var, 0.9 + 0.1 * tokens.var(0), 1e-6)
    assert_close(norm.running_mean, 0.1 * tokens.mean(0), 1e-6)


@pytest.mark.parametrize(
    ("layout", "channel_dim"),
    [
        (lambda: torch.randn(5, C, 2, dtype=torch.float64).transpose(1, 2), -1),
        (lambda: torch.randn(4, 10, 2 * C, dtype=torch.float64)[:, ::2, ::2], -1),
        (lambda: torch.randn(2, C, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last), 1),
        (lambda: torch.randn(2, 1, C, dtype=torch.float64).expand(2, 7, C), -1),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_memory_layout_changes_nothing(layout: Callable[[], Tensor], channel_dim: int, training: bool) -> None:
    outputs, x = [], layout()
    for tokens in (x, x.clone(memory_format=torch.contiguous_format)):
        norm = trained(channel_dim).train(training)
        tokens = tokens.detach().requires_grad_()
        y = norm(tokens)
        y.square().sum().backward()
        outputs.append([y, tokens.grad, norm.weight.grad, norm.running_var])
    for ours, theirs in zip(*outputs, strict=True):
        assert_close(ours, theirs, ALGEBRA)


def test_channels_last_maps_stay_channels_last() -> None:
    x = torch.randn(2, C, 4, 3).to(memory_format=torch.channels_last)
    assert trained(1, torch.float32)(x).is_contiguous(memory_format=torch.channels_last)


MASK = torch.tensor([[True, True, False, True], [True, False, False, False]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["no_mask", "mask"])
def test_gradients_match_finite_differences(mask: Tensor | None) -> None:
    norm = trained()
    norm.token_mask = mask
    x = torch.randn(2, 4, C, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, eta: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias, "eta": eta}, (x,))

    assert torch.autograd.gradcheck(run, (x, norm.weight, norm.bias, norm.eta))


def test_masked_tokens_count_as_dropped() -> None:
    norm, dropped = trained(), trained()
    x = torch.randn(2, 4, C, dtype=torch.float64, requires_grad=True)
    valid = x.detach()[MASK].requires_grad_()
    with token_mask(norm, MASK):
        y = norm(x)
    expected = dropped(valid)
    y[MASK].square().sum().backward()
    expected.square().sum().backward()
    assert_close(y[MASK], expected, ALGEBRA)
    assert_close(x.grad[MASK], valid.grad, ALGEBRA)
    assert not x.grad[~MASK].any()
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, dropped.get_parameter(name).grad, ALGEBRA)
    assert_close(norm.running_mean, dropped.running_mean, ALGEBRA)
    assert_close(norm.running_var, dropped.running_var, ALGEBRA)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_does_not_leak(garbage: float) -> None:
    norm, clean = trained(dtype=torch.float32), trained(dtype=torch.float32)
    x = torch.randn(2, 4, C)
    results = []
    for module, fill in ((norm, garbage), (clean, 0.0)):
        leaf = x.masked_fill(~MASK.unsqueeze(-1), fill).requires_grad_()
        with token_mask(module, MASK):
            y = module(leaf)
        y[MASK].square().sum().backward()
        results.append([y[MASK], leaf.grad, module.weight.grad, module.bias.grad, module.eta.grad])
        results[-1] += [module.running_mean, module.running_var]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, EXACT)


@pytest.mark.parametrize("num_valid", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "average"])
def test_fewer_than_two_valid_tokens_teach_nothing(num_valid: int, momentum: float | None) -> None:
    norm = RepBN(C, momentum=momentum)
    x = torch.randn(2, 4, C)
    norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask.view(-1)[:num_valid] = True
    with token_mask(norm, mask):
        assert norm(x)[mask].isfinite().all()
    for name, value in norm.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_all_true_mask_is_no_mask() -> None:
    masked, plain = trained(), trained()
    x = torch.randn(2, 4, C, dtype=torch.float64)
    with token_mask(masked, torch.ones(2, 4, dtype=torch.bool)):
        assert_close(masked(x), plain(x), ALGEBRA)
    assert_close(masked.running_var, plain.running_var, ALGEBRA)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RepBN(C, channel_dim=2), "channel_dim must be -1"),
        (lambda: RepBN(C)(torch.zeros(2, 3, C + 1)), r"over 6 channels on axis -1, got input of shape \(2, 3, 7\)"),
        (lambda: RepBN(C, channel_dim=1)(torch.zeros(2, 3, C)), "channels on axis 1"),
        (lambda: RepBN(C)(torch.zeros(C)), "got input of shape"),
        (lambda: RepBN(C)(torch.zeros(1, 1, C)), "more than one token"),
        (lambda: RepBN(C)(torch.zeros(0, 3, C)), "more than one token"),
        (lambda: PRepBN(C, channel_dim=1), "pass norm="),
        (lambda: PRepBN(C).set_gamma(1.5), "gamma must be in"),
        (lambda: PRepBN(C).set_gamma(float("nan")), "gamma must be in"),
        (lambda: PRepBN(C).set_gamma(0.5, "melting"), "phase must be one of"),
        (lambda: PRepBN(C).set_gamma(0.5, "done"), "does not go with"),
        (lambda: PRepBN(C).set_gamma(0.0, "fading"), "does not go with"),
        (lambda: PRepBN(C).fuse(), "still holds its norm"),
    ],
)
def test_misuse_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_mask_of_another_shape_is_refused() -> None:
    norm = RepBN(C)
    with token_mask(norm, MASK), pytest.raises(ValueError, match="does not fit tokens"):
        norm(torch.zeros(2, 5, C))


def test_one_token_is_enough_in_eval() -> None:
    assert RepBN(C).eval()(torch.zeros(1, 1, C)).shape == (1, 1, C)


def test_momentum_none_averages_all_batches() -> None:
    norm, bn = RepBN(C, momentum=None, dtype=torch.float64), nn.BatchNorm1d(C, momentum=None, dtype=torch.float64)
    for batch in torch.randn(5, 8, C, dtype=torch.float64):
        norm(batch)
        bn(batch)
    assert_close(norm.running_mean, bn.running_mean, ALGEBRA)
    assert_close(norm.running_var, bn.running_var, ALGEBRA)


def test_warm_statistics_average_first_then_follow_momentum() -> None:
    norm = RepBN(C, momentum=0.25, dtype=torch.float64)
    norm.warm_statistics = True
    batches = 5 + torch.randn(6, 8, C, dtype=torch.float64)
    means = batches.mean(1)
    for batch in batches[:4]:
        norm(batch)
    assert_close(norm.running_mean, means[:4].mean(0), ALGEBRA)  # nothing left of the start at 0
    for batch in batches[4:]:
        norm(batch)
    assert_close(norm.running_mean, 0.75 * (0.75 * means[:4].mean(0) + 0.25 * means[4]) + 0.25 * means[5], ALGEBRA)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(copier: Callable[[PRepBN], PRepBN]) -> None:
    norm = PRepBN(C)
    norm.set_gamma(0.4)
    norm.rep.token_mask = MASK
    x = torch.randn(2, 4, C)
    norm(x)
    twin = copier(norm)
    assert twin.phase == "fading"
    assert_close(twin(x), norm(x), EXACT)
    assert_close(twin.rep.running_var, norm.rep.running_var, EXACT)
    twin.set_gamma(0.0)
    assert norm.gamma == torch.tensor(0.4)


@pytest.mark.parametrize("channel_dim", [-1, 1], ids=["tokens", "maps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_norm_is_an_affine_with_the_same_output(channel_dim: int, dtype: torch.dtype) -> None:
    norm = trained(channel_dim, dtype).eval()
    x = torch.randn((2, 3, 5, C) if channel_dim == -1 else (2, C, 3, 5)).to(dtype)
    affine = norm.fuse()
    assert isinstance(affine, Affine)
    assert not affine.training
    assert affine.weight.dtype == dtype
    assert_close(affine(x), norm(x), {torch.float64: ALGEBRA, torch.float32: FLOAT32}.get(dtype, 0.03))


def test_timm_reparameterizes_a_finished_model_and_refuses_a_fading_one() -> None:
    model = nn.Sequential(nn.Linear(C, C), PRepBN(C), nn.Sequential(RepBN(C)))
    for module in model.modules():
        if isinstance(module, RepBN):
            module.load_state_dict(trained(dtype=torch.float32).state_dict())
    model.eval()
    with pytest.raises(ValueError, match="still holds its norm"):
        reparameterize_model(model)
    model[1].set_gamma(0)
    fused = reparameterize_model(model)
    assert [type(fused[1]), type(fused[2][0])] == [Affine, Affine]
    x = torch.randn(2, 3, C)
    assert_close(fused(x), model(x), FLOAT32)


def loud(dim: int) -> nn.LayerNorm:
    """A LayerNorm whose output is NaN, to show whether it is computed."""
    norm = nn.LayerNorm(dim)
    nn.init.constant_(norm.weight, float("nan"))
    return norm


def test_done_phase_does_not_compute_the_old_norm() -> None:
    norm = PRepBN(C, norm=loud(C))
    norm.set_gamma(0)
    x = torch.randn(2, 3, C, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert not norm.norm.weight.grad.any()
    norm.set_gamma(0.5)
    assert norm(x).isnan().all()


def test_eval_is_repbn_whatever_gamma() -> None:
    norm = PRepBN(C, norm=loud(C)).eval()
    x = torch.randn(2, 3, C)
    for gamma in (1.0, 0.5, 0.0):
        norm.set_gamma(gamma)
        assert_close(norm(x), norm.rep(x), EXACT)


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_blended_eval_is_the_weighted_sum_of_both(gamma: float) -> None:
    norm = PRepBN(C, norm=nn.LayerNorm(C)).eval()
    norm.rep.load_state_dict(trained(dtype=torch.float32).state_dict())
    norm.set_gamma(gamma)
    x = torch.randn(2, 3, C)
    before = copy.deepcopy(norm.state_dict())
    with blended(norm):
        assert_close(norm(x), gamma * norm.norm(x) + (1 - gamma) * norm.rep(x), FLOAT32)
    assert_close(norm(x), norm.rep(x), EXACT)
    for name, value in norm.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_fading_gradients_are_those_of_the_weighted_sum() -> None:
    norm, twin = PRepBN(C, dtype=torch.float64), PRepBN(C, dtype=torch.float64)
    norm.double().set_gamma(0.3)
    x = torch.randn(2, 3, C, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    norm(x).pow(3).sum().backward()
    (norm.gamma * twin.norm(twin_x) + (1 - norm.gamma) * twin.rep(twin_x)).pow(3).sum().backward()
    assert_close(x.grad, twin_x.grad, ALGEBRA)
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, twin.get_parameter(name).grad, ALGEBRA)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0], ids=["warm", "fading", "done"])
def test_output_may_be_edited_in_place(gamma: float) -> None:
    norm, twin = PRepBN(C), PRepBN(C)
    norm.set_gamma(gamma)
    twin.set_gamma(gamma)
    x = torch.randn(2, 3, C)
    norm(x).relu_().sum().backward()
    twin(x).relu().sum().backward()
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, twin.get_parameter(name).grad, EXACT)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0], ids=["warm", "fading", "done"])
def test_every_parameter_gets_a_gradient_in_every_phase(gamma: float) -> None:
    norm = PRepBN(C)
    norm.set_gamma(gamma)
    norm(torch.randn(2, 3, C)).sum().backward()
    assert all(parameter.grad is not None for parameter in norm.parameters())


def test_gamma_may_be_written_between_forward_and_backward() -> None:
    norm, twin = PRepBN(C), PRepBN(C)
    x = torch.randn(2, 3, C)
    for module in (norm, twin):
        module.set_gamma(0.5)
    y = norm(x)
    norm.set_gamma(0.25)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    assert_close(norm.norm.weight.grad, twin.norm.weight.grad, EXACT)


@pytest.mark.parametrize(("gamma", "phase"), [(1.0, "warm"), (0.999, "fading"), (1e-7, "fading"), (0.0, "done")])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_phase_is_derived_when_a_state_dict_is_loaded(gamma: float, phase: str, assign: bool) -> None:
    source, target = nn.Sequential(PRepBN(C)), nn.Sequential(PRepBN(C))
    source[0].set_gamma(gamma)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target[0].phase == phase
    assert target[0].gamma == source[0].gamma


def test_meta_device_builds_loads_and_prints() -> None:
    norm = PRepBN(C, device="meta")
    assert "warm" in repr(norm)
    source = PRepBN(C)
    source.set_gamma(0)
    norm.load_state_dict(source.state_dict(), assign=True)
    assert norm.phase == "done"
    assert norm.eval()(torch.zeros(2, 3, C)).isfinite().all()


def test_attributes_that_other_code_reads_off_a_norm() -> None:
    norm = PRepBN(C, eps=1e-3)
    assert norm.eps == 1e-3
    assert norm.normalized_shape == (C,)
    assert norm.weight is norm.rep.weight
    assert norm.bias is norm.rep.bias
    names = "norm.weight norm.bias rep.weight rep.bias rep.eta rep.running_mean rep.running_var rep.num_batches_tracked"
    assert set(norm.state_dict()) == {*names.split(), "gamma"}
    assert len(dict(norm.named_parameters())) == 5


def test_autocast_keeps_the_input_dtype_and_float32_statistics() -> None:
    norm = PRepBN(C)
    norm.set_gamma(0.5)
    x = (100 + torch.randn(4, 197, C)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm.rep.running_mean.dtype == torch.float32
    assert_close(norm.rep.running_mean, 0.1 * x.double().mean((0, 1)), FLOAT32)
