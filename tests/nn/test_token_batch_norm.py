"""Plain BatchNorm over tokens is torch's, with the switches of RepBN."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer.testing import randomize_norms_
from tolerances import EXACT, FLOAT32, assert_close

C = 6


def pair() -> tuple[sf.TokenBatchNorm, nn.BatchNorm1d]:
    ours, torchs = sf.TokenBatchNorm(C), randomize_norms_(nn.BatchNorm1d(C))
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_outputs_gradients_and_statistics_are_those_of_torch(train: bool) -> None:
    ours, torchs = pair()
    x = torch.randn(3, 7, C, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (ours.train(train)(x) ** 3).sum().backward()
    (torchs.train(train)(y.flatten(0, 1)) ** 3).sum().backward()
    assert_close(x.grad, y.grad, FLOAT32)
    for name, parameter in torchs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, FLOAT32)
    assert_close(ours.running_var, torchs.running_var, FLOAT32)


def test_its_state_is_that_of_a_batchnorm_and_no_parameter_is_a_skip() -> None:
    ours, torchs = pair()
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert list(dict(ours.named_parameters())) == ["weight", "bias"]
    assert list(sf.norm_parameters(nn.Sequential(ours))) == ["0.weight", "0.bias"]


def test_maps_are_normalised_over_their_channels() -> None:
    x, torchs = torch.randn(2, C, 4, 3), nn.BatchNorm2d(C)
    assert_close(sf.TokenBatchNorm(C, channel_dim=1)(x), torchs(x), FLOAT32)


def test_a_token_mask_keeps_padding_out() -> None:
    model, x = nn.Sequential(sf.TokenBatchNorm(C, momentum=1.0)), torch.randn(2, 5, C)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    with sf.token_mask(model, mask):
        model(x)
    assert_close(model[0].running_mean, x[mask].mean(0), FLOAT32)


def test_recalibration_takes_the_population() -> None:
    model, x = nn.Sequential(sf.TokenBatchNorm(C)), torch.randn(8, 5, C)
    sf.recalibrate_(model, x.split(3))
    assert_close(model[0].running_var, x.flatten(0, 1).var(0, correction=0), FLOAT32)


def test_ranks_share_its_statistics() -> None:
    model = nn.Sequential(sf.TokenBatchNorm(C))
    sf.sync_norms_(model)
    assert model[0].sync is not None


def test_it_comes_back_from_the_meta_device() -> None:
    ours, x = randomize_norms_(sf.TokenBatchNorm(C)), torch.randn(2, 5, C)
    with torch.device("meta"):
        empty = sf.TokenBatchNorm(C)
    for load in (
        lambda: empty.to_empty(device="cpu").load_state_dict(ours.state_dict()),
        lambda: empty.to("meta").load_state_dict(ours.state_dict(), assign=True),
    ):
        load()
        assert_close(empty.eval()(x), ours.eval()(x), EXACT)
    empty.to_empty(device="cpu").reset_parameters()
    assert_close(empty(x), sf.TokenBatchNorm(C).eval()(x), EXACT)


def test_it_scripts() -> None:
    model, x = nn.Sequential(randomize_norms_(sf.TokenBatchNorm(C))).eval(), torch.randn(2, 5, C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(torch.jit.script(model)(x), model(x), EXACT)


def test_another_batchnorm_is_refused() -> None:
    model = nn.Sequential(sf.TokenBatchNorm(C))
    with pytest.raises(TypeError, match=r"TokenBatchNorm cannot become another BatchNorm.*call slabformer.sync_norms_"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_a_lone_token_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="TokenBatchNorm needs more than one token to train on"):
        sf.TokenBatchNorm(C)(torch.randn(1, C))
    with pytest.raises(ValueError, match="TokenBatchNorm over 6 channels on axis -1"):
        sf.TokenBatchNorm(C)(torch.randn(2, 5))
