import pytest
import torch
import torch.nn.functional as F

from slabformer.ops.affine import compose, fold_into_next, fold_into_previous, repbn_scale_shift, spread
from tolerances import ALGEBRA, assert_close

CONVS = [
    pytest.param(1, (3,), 1, id="conv1d"),
    pytest.param(2, (3, 2), 1, id="conv2d"),
    pytest.param(2, (2, 2), 2, id="two-groups"),
    pytest.param(2, (3, 3), 6, id="depthwise"),
    pytest.param(3, (2, 1, 2), 3, id="conv3d"),
]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)), dtype=torch.float64)


def along_channels(t: torch.Tensor, spatial: int) -> torch.Tensor:
    return t.view(-1, *[1] * spatial)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_a_linear_takes_over_what_precedes_it(with_bias: bool) -> None:
    x, w, scale, shift = draw(5, 6), draw(4, 6), draw(6), draw(6) + 2
    bias = draw(4) if with_bias else None
    expected = F.linear(x * scale + shift, w, bias)
    assert_close(F.linear(x, *fold_into_next(w, bias, scale, shift)), expected, ALGEBRA)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_a_linear_takes_over_what_follows_it(with_bias: bool) -> None:
    x, w, scale, shift = draw(5, 6), draw(4, 6), draw(4), draw(4) + 2
    bias = draw(4) if with_bias else None
    expected = F.linear(x, w, bias) * scale + shift
    assert_close(F.linear(x, *fold_into_previous(w, bias, scale, shift)), expected, ALGEBRA)


@pytest.mark.parametrize(("spatial", "kernel", "groups"), CONVS)
def test_an_unpadded_conv_takes_over_what_precedes_it(spatial: int, kernel: tuple[int, ...], groups: int) -> None:
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    x, w, bias = draw(2, 6, *[5] * spatial), draw(12, 6 // groups, *kernel), draw(12)
    scale, shift = draw(6), draw(6) + 2
    seen = x * along_channels(scale, spatial) + along_channels(shift, spatial)
    weight, folded = fold_into_next(w, bias, scale, shift, groups)
    assert_close(conv(x, weight, folded, groups=groups), conv(seen, w, bias, groups=groups), ALGEBRA)


@pytest.mark.parametrize(("spatial", "kernel", "groups"), CONVS)
def test_a_padded_conv_takes_over_what_follows_it(spatial: int, kernel: tuple[int, ...], groups: int) -> None:
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    x, w, bias = draw(2, 6, *[5] * spatial), draw(12, 6 // groups, *kernel), draw(12)
    scale, shift = draw(12), draw(12) + 2
    out = conv(x, w, bias, padding=1, groups=groups)
    expected = out * along_channels(scale, spatial) + along_channels(shift, spatial)
    actual = conv(x, *fold_into_previous(w, bias, scale, shift), padding=1, groups=groups)
    assert_close(actual, expected, ALGEBRA)


def test_folding_is_done_in_float64_whatever_the_weights_are() -> None:
    w, scale, shift = draw(4, 6).half(), draw(6), draw(6)
    for fold, channels in ((fold_into_next, 6), (fold_into_previous, 4)):
        weight, bias = fold(w, None, scale[:channels], shift[:channels])
        assert weight.dtype == bias.dtype == torch.float64


def test_a_zero_scale_needs_no_division() -> None:
    weight, bias = fold_into_previous(draw(4, 6), draw(4), torch.zeros(4), torch.ones(4))
    assert_close(weight, torch.zeros(4, 6), 0.0)
    assert_close(bias, torch.ones(4).double(), 0.0)


def test_spread_leaves_channels_of_nobody_alone() -> None:
    scale, shift = spread(torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0]), torch.tensor([1, -1, 0, 1]))
    assert scale.tolist() == [3, 1, 2, 3]
    assert shift.tolist() == [7, 0, 5, 7]


def test_compose_is_one_map_after_the_other() -> None:
    x, first, second = draw(7, 3), (draw(3), draw(3) + 1), (draw(3) + 2, draw(3) + 3)
    scale, shift = compose(first, second)
    assert_close(x * scale + shift, (x * first[0] + first[1]) * second[0] + second[1], ALGEBRA)


def test_repbn_is_batch_norm_plus_eta_times_its_input() -> None:
    x, weight, bias, mean, var, eta = draw(9, 5), draw(5), draw(5), draw(5), draw(5).square() + 0.1, draw(1)
    expected = F.batch_norm(x, mean, var, weight, bias, eps=1e-3) + eta * x
    scale, shift = repbn_scale_shift(weight, bias, mean, var, eta, eps=1e-3)
    assert_close(x * scale + shift, expected, ALGEBRA)
