"""Norms in front of recurrent layers, which read their input by one Linear a direction."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusing import X, codes, fused, net, norm
from slabformer.surgery.fuse import Reason

LAYERS = {
    "lstm": lambda **options: nn.LSTM(6, 5, **options),
    "gru": lambda **options: nn.GRU(6, 5, **options),
    "rnn": lambda **options: nn.RNN(6, 5, **options),
    "rnn_relu": lambda **options: nn.RNN(6, 5, nonlinearity="relu", **options),
    "lstm_with_projection": lambda **options: nn.LSTM(6, 5, proj_size=3, **options),
}
OPTIONS = {
    "one_direction": {},
    "both_directions": {"bidirectional": True, "batch_first": True},
    "two_layers": {"num_layers": 2, "bidirectional": True},
}


def read(m: Any, x: Tensor) -> Tensor:
    return m.layer(m.norm(x))[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_a_norm_folds_into_the_input_weights_of_each_direction(build: Any, options: dict[str, Any]) -> None:
    _, report = fused(net(read, norm=norm(), layer=build(**options)), X)
    reverse = ("layer.weight_ih_l0_reverse",) if "bidirectional" in options else ()
    assert (report["norm"].action, report["norm"].into) == ("forward", ("layer.weight_ih_l0", *reverse))


def test_a_recurrent_layer_in_front_of_a_norm_is_no_linear_that_could_take_it_over() -> None:
    model = net(lambda m, x: torch.tanh(m.norm(m.layer(x)[0])), layer=nn.LSTM(6, 5), norm=norm(5))
    assert codes(model)[-1] == Reason.COMES_FROM_OPERATION


def test_a_norm_that_is_the_state_of_a_recurrent_layer_is_kept() -> None:
    model = net(lambda m, x: m.layer(x.sin(), m.norm(x[:1]))[0], norm=norm(), layer=nn.GRU(6, 6))
    assert codes(model)[0] == Reason.FURTHER_ARGUMENT


def test_a_recurrent_layer_without_biases_keeps_the_norm() -> None:
    model = net(read, norm=norm(), layer=nn.LSTM(6, 5, bias=False))
    assert codes(model)[0] == Reason.NO_BIAS


def test_a_recurrent_layer_that_also_reads_something_else_keeps_the_norm() -> None:
    model = net(lambda m, x: m.layer(m.norm(x))[0] + m.layer(x)[0], norm=norm(), layer=nn.LSTM(6, 5))
    assert codes(model)[0] == Reason.SHARED_LAYER
