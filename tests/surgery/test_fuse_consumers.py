"""Every kind of layer that may take a norm over is tried with its own samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusing import fused, net
from slabformer.nn import RepBN
from slabformer.surgery.fuse import (
    Consumer,
    ModuleConsumer,
    Rule,
    Sample,
    Site,
    register_consumer,
    register_rule,
    same,
)
from slabformer.surgery.fuse.consumers import CONSUMERS

SAMPLES = [
    pytest.param(consumer, sample, id=f"{type(consumer).__name__}{number}")
    for consumer in CONSUMERS
    for number, sample in enumerate(consumer.samples)
]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_every_consumer_that_a_graph_shows_has_a_sample() -> None:
    assert all(consumer.samples for consumer in CONSUMERS)


@pytest.mark.parametrize(("consumer", "sample"), [p for p in SAMPLES if p.values[0].reads])
def test_a_norm_in_front_goes_into_it(consumer: Consumer, sample: Sample) -> None:
    x = sample.input()
    norm = RepBN(x.shape[sample.channel_dim], channel_dim=sample.channel_dim)
    model = net(lambda m, x: first(m.layer(m.norm(x.sin()))), norm=norm, layer=sample.build())
    outcome = fused(model, x)[1]["norm"]
    assert outcome.action == "forward"
    assert all(name.startswith("layer") for name in outcome.into)


@pytest.mark.parametrize(("consumer", "sample"), [p for p in SAMPLES if p.values[0].writes])
def test_a_norm_behind_goes_into_it(consumer: Consumer, sample: Sample) -> None:
    x, layer = sample.input(), sample.build().double()
    norm = RepBN(layer(x).shape[sample.channel_dim], channel_dim=sample.channel_dim)
    model = net(lambda m, x: m.norm(m.layer(x)).tanh(), layer=layer, norm=norm)
    outcome = fused(model, x)[1]["norm"]
    assert (outcome.action, outcome.into) == ("backward", ("layer",))


@pytest.mark.parametrize(("consumer", "sample"), [p for p in SAMPLES if not p.values[0].writes])
def test_a_norm_behind_what_is_no_map_stays(consumer: Consumer, sample: Sample) -> None:
    x, layer = sample.input(), sample.build().double()
    model = net(lambda m, x: m.norm(first(m.layer(x))).tanh(), layer=layer, norm=RepBN(first(layer(x)).shape[-1]))
    assert fused(model, x)[1]["norm"].action == "kept"


class Empty(Consumer):
    pass


class Again(Consumer):
    ops = (torch.ops.aten.linear.default,)

    def sites(self, node: Any) -> list[Site]:
        return []


class Anything(ModuleConsumer):
    module = "Linear"  # type: ignore[assignment]


BAD = {
    "no class": (3, TypeError, "takes a subclass of Consumer or ModuleConsumer, got 3"),
    "an instance": (Empty(), TypeError, "takes a subclass of Consumer"),
    "no operation": (Empty, ValueError, "Empty.ops is empty; name operations such as"),
    "taken": (Again, ValueError, "aten.linear.default has a consumer already: Linear"),
    "no module": (Anything, ValueError, "Anything.module must be a class of modules, got 'Linear'"),
}


@pytest.mark.parametrize(("given", "error", "said"), BAD.values(), ids=BAD)
def test_what_is_no_consumer_is_refused(given: Any, error: type[Exception], said: str) -> None:
    before = list(CONSUMERS)
    with pytest.raises(error, match=said):
        register_consumer(given)
    assert before == CONSUMERS


def test_a_rule_for_what_has_one_and_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aten.roll.default has a rule already"):
        register_rule(Rule((torch.ops.aten.roll.default,), same))
    with pytest.raises(ValueError, match="at least one operation"):
        register_rule(Rule((), same))
    with pytest.raises(TypeError, match="register_rule takes a Rule, got str"):
        register_rule("roll")  # type: ignore[arg-type]
