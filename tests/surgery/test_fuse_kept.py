"""The reasons for norms that stay, and what holds over several examples and sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fusing import X, assert_same_outputs, codes, fused, net, norm, outcomes, ready, reason, tokens
from slabformer.nn import RepBN
from slabformer.surgery.fuse import Reason, fuse

MAPS = tokens(2, 6, 5, 5)


KEPT = {
    "post-norm": (lambda m, x: m.linear(m.norm(x)) + m.norm(x), "its output also feeds an add (post-norm block)"),
    "residual": (lambda m, x: m.norm(x) + x, "its output feeds an add"),
    "sum": (lambda m, x: m.linear(m.norm(x).sum(1)), "its output feeds a sum"),
    "activation": (lambda m, x: m.linear(F.gelu(m.norm(x))), "its output feeds a gelu"),
    "output": (lambda m, x: m.norm(x.sin()), "its output is the model's output"),
    "product of two": (lambda m, x: m.norm(x) @ x.mT, "its output feeds a matmul"),
    "raw matmul": (lambda m, x: m.norm(x) @ m.linear.weight, "linear has no bias to take the shift"),
    "factor of a matmul": (lambda m, x: m.linear.weight @ m.norm(x).mT, "its output feeds a matmul"),
    "tokens mixed": (lambda m, x: m.mix(m.norm(x).mT), "a Linear mixes another axis than its channels"),
    "some tokens mixed": (
        lambda m, x: m.mix(torch.cat([m.norm(x)[:, :1], x[:, 1:]], 1).mT),
        "a Linear mixes another axis than its channels",
    ),
    "weight computed": (lambda m, x: F.linear(m.norm(x), m.linear.weight * 2), "computed in the forward"),
    "bias computed": (
        lambda m, x: F.linear(m.norm(x), m.linear.weight, m.linear.bias * 2),
        "the bias of linear is computed in the forward",
    ),
    "bias not read": (lambda m, x: F.linear(m.norm(x), m.linear.weight), "linear has no bias to take the shift"),
    "in place": (lambda m, x: _late_read(m, x), "its input is changed in place before its output is read"),
    "never called": (lambda m, x: m.linear(x), "it is not called on the example inputs"),
    "norm of itself": (
        lambda m, x: m.linear(m.norm(m.norm(x))),
        "its output also feeds a norm that cannot take it over",
    ),
    "producer shared": (
        lambda m, x: torch.tanh(m.norm(y := m.linear(x))) + y,
        "the output of linear also feeds an add",
    ),
}


def _late_read(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = m.norm(x)
    x.add_(1)
    return m.linear(y) + x


@pytest.mark.parametrize(("forward", "why"), KEPT.values(), ids=KEPT)
def test_a_norm_is_kept_with_its_reason(forward: Any, why: str) -> None:
    assert why in reason(net(forward, norm=norm(), linear=nn.Linear(6, 6), mix=nn.Linear(4, 4)))


def pooled_behind_a_gone_norm(m: Any, x: Tensor, join: Any) -> tuple[Tensor, Tensor]:
    y = m.inner(m.linear(x))
    pooled = F.avg_pool2d(y.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    return torch.tanh(m.norm(join(pooled, y))), m.reader(y)


@pytest.mark.parametrize(
    "join",
    [lambda a, b: a, lambda a, b: torch.cat([a[..., :2], b[..., 2:]], -1)],
    ids=["all channels", "some channels"],
)
def test_an_operation_that_hides_channels_from_a_norm_bars_the_way_back(join: Any) -> None:
    model = net(
        lambda m, x: pooled_behind_a_gone_norm(m, x, join),
        linear=nn.Linear(6, 6),
        inner=norm(),
        reader=nn.Linear(6, 6),
        norm=norm(),
    )
    _, report = fused(model, tokens(2, 4, 4, 6))
    assert report["inner"].action == "backward"
    assert "seen from linear, it is followed by a padded avg_pool2d" in report["norm"].reason


def test_a_padded_convolution_keeps_the_norm() -> None:
    model = net(lambda m, x: m.conv(m.norm(x)), norm=norm(6, 1), conv=nn.Conv2d(6, 4, 3, padding=1))
    assert reason(model, MAPS).startswith("it is followed by a padded convolution (conv)")


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, lambda m: parametrizations.spectral_norm(m, n_power_iterations=1)],
    ids=["weight_norm", "spectral_norm"],
)
def test_a_parametrized_weight_keeps_the_norm(wrap: Any) -> None:
    model = net(lambda m, x: m.linear(m.norm(x)), norm=norm(), linear=wrap(nn.Linear(6, 6)))
    assert Reason.COMPUTED_WEIGHT in codes(model)
    assert parametrize.is_parametrized(fuse(model, X)[0].linear)


def test_a_linear_that_ignores_its_bias_has_the_fold_rolled_back_alone() -> None:
    class Biasless(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias if type(self) is nn.Linear else None)

    model = net(
        lambda m, x: m.b(m.two(torch.tanh(m.a(m.one(x))))),
        one=norm(),
        a=Biasless(6, 6, bias=False),
        two=norm(),
        b=nn.Linear(6, 6),
    )
    result, report = fused(model, X)
    assert report["one"].codes == (Reason.OUTPUT_CHANGES,)
    assert report["two"].action == "forward"
    assert result.a.bias is None


def test_folds_that_would_overflow_half_precision_are_left_out() -> None:
    model = net(lambda m, x: m.b(torch.tanh(m.a(m.norm(x)))), norm=norm(), a=nn.Linear(6, 6), b=nn.Linear(6, 2))
    with torch.no_grad():
        model.norm.weight.fill_(3e4)
        model.a.weight.fill_(30)
    _, report = fuse(model.half(), X.half())
    assert report["norm"].codes == (Reason.OUTPUT_CHANGES,)


def test_a_norm_whose_weight_is_read_raw_is_left_alone() -> None:
    model = net(lambda m, x: m.linear(m.norm(x)) * m.norm.weight.sum(), norm=norm(), linear=nn.Linear(6, 6))
    result, report = fused(model, X)
    assert report["norm"].codes == (Reason.READ_RAW,)
    assert isinstance(result.norm, RepBN)


# --- several examples, sizes ---------------------------------------------------------------------------------------


def windows(m: Any, x: Tensor) -> Tensor:
    y, size = m.norm(x), x.shape[1]
    if size % 4:
        y = F.pad(y, (0, 0, 0, 4 - size % 4))
    return m.linear(y)


def test_a_fold_must_hold_for_every_example() -> None:
    model = net(windows, norm=norm(), linear=nn.Linear(6, 6))
    assert outcomes(model, [tokens(2, 4, 6), tokens(3, 8, 6)])[0][1] == "forward"
    assert codes(model, [tokens(2, 4, 6), tokens(2, 5, 6)])[0] == Reason.PADDED


class Windows(nn.Module):
    """Windows of 14 pixels by a convolution, padded where the image needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.windows = norm(3, 1), nn.Conv2d(3, 4, 14, 14)

    def forward(self, x: Tensor) -> Tensor:
        y, pad = self.norm(x.sin()), -x.shape[-1] % 14
        return self.windows(F.pad(y, (0, pad, 0, pad)) if pad > 0 else y)


def test_a_pad_that_the_example_does_not_need_is_found_at_another_size() -> None:
    model, image = ready(Windows()), tokens(1, 3, 112, 112)
    result, report = fused(model, image)
    assert report["norm"].codes[0] == Reason.PADDED
    assert report.input_shapes == (((1, 3, 112, 112),), ((1, 3, 80, 80),))
    assert_same_outputs(model, result, (tokens(1, 3, 100, 100),))
    assert fused(model, image, fixed_size=True)[1]["norm"].action == "forward"


def test_a_model_for_one_size_is_tried_at_no_other() -> None:
    model = net(lambda m, x: m.head(m.norm(x).flatten(1)), norm=norm(3, 1), head=nn.Linear(3 * 64 * 64, 2))
    _, report = fused(model, tokens(1, 3, 64, 64))
    assert (report["norm"].action, report.input_shapes) == ("forward", (((1, 3, 64, 64),),))


def test_the_report_names_the_shapes_that_it_holds_for() -> None:
    _, report = fuse(net(windows, norm=norm(), linear=nn.Linear(6, 6)), [tokens(2, 4, 6), tokens(3, 8, 6)])
    assert report.input_shapes == (((2, 4, 6),), ((3, 8, 6),))
    assert "(2, 4, 6); (3, 8, 6)" in report.table()


def test_fixed_size_takes_a_pad_by_0_as_none_and_refuses_other_sizes() -> None:
    model = net(
        lambda m, x: m.linear(F.pad(m.norm(x), (0, 0, 0, -x.shape[1] % 4))), norm=norm(), linear=nn.Linear(6, 6)
    )
    assert codes(model)[0] == Reason.PADDED
    result, report = fused(model, X, fixed_size=True)
    assert report["norm"].action == "forward"
    assert_same_outputs(model, result, (tokens(7, 4, 6),))
    with pytest.raises(ValueError, match="fused with fixed_size=True for inputs of size 4x6, got 5x6"):
        result(tokens(2, 5, 6))
