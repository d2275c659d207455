"""A layer and an operation of one's own, added from outside the package through public names alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer.nn import RepBN
from slabformer.surgery.fuse import (
    Consumer,
    ModuleConsumer,
    Reason,
    RefusalError,
    Rule,
    Site,
    moved,
    register_consumer,
    register_rule,
)
from slabformer.testing import randomize_norms_


class Scored(nn.Module):
    """A Linear whose weight is a product, which no graph of operations shows as one."""

    def __init__(self, num_in: int, num_out: int, bias: bool = True) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(num_out, num_in))
        self.gain = nn.Parameter(torch.rand(num_out) + 0.5)
        self.offset = nn.Parameter(torch.randn(num_out)) if bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = torch.einsum("...c,oc->...o", x, self.direction.mul(2)) * self.gain
        y = y if self.offset is None else y + self.offset
        return y if mask is None else y * mask


class ScoredConsumer(ModuleConsumer):
    words = "scored layer"
    module = Scored

    def check(self, module: nn.Module, side: str) -> None:
        if module.offset is None:
            raise RefusalError(Reason.NO_BIAS, "the scored layer has no offset")

    def take_input(self, tensors: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        moved_by = 2 * tensors["gain"] * (tensors["direction"] @ shift)
        return {"direction": tensors["direction"] * scale, "offset": tensors["offset"] + moved_by}

    def take_output(self, tensors: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"gain": tensors["gain"] * scale, "offset": tensors["offset"] * scale + shift}


@torch.library.custom_op("slabformer_tests::swap_halves", mutates_args=())
def swap_halves(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([two, one], -1)


@swap_halves.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("slabformer_tests::project", mutates_args=())
def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.mT + bias


@project.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class ProjectConsumer(Consumer):
    words = "projection"
    ops = (torch.ops.slabformer_tests.project.default,)

    def sites(self, node: torch.fx.Node) -> list[Site]:
        return [Site(node, self, *node.args)]


class Net(nn.Module):
    def __init__(self, forward: object, **children: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


X = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fused(forward: object, **children: nn.Module) -> sf.FuseReport:
    torch.manual_seed(0)
    model = randomize_norms_(Net(forward, norm=RepBN(6), **children)).eval().double()
    result, report = sf.fuse(model, X)
    sf.verify(model, result, [X, X.flip(1)])
    return report


@pytest.fixture
def scored() -> Iterator[None]:
    registered = register_consumer(ScoredConsumer)
    yield
    registered.remove()


@pytest.fixture
def swapped() -> Iterator[None]:
    registered = register_rule(Rule((torch.ops.slabformer_tests.swap_halves.default,), moved))
    yield
    registered.remove()


def test_nothing_of_it_is_known_without_registration() -> None:
    layer = nn.Linear(6, 3)
    assert fused(lambda m, x: m.layer(m.norm(x)), layer=Scored(6, 3))["norm"].action == "kept"
    assert fused(lambda m, x: m.layer(swap_halves(m.norm(x.sin()))), layer=layer)["norm"].action == "kept"


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.layer(m.norm(x.sin())).tanh(), "forward"),
        (lambda m, x: m.norm(m.layer(x).roll(1, 1)).tanh(), "backward"),
        (lambda m, x: m.layer(m.norm(x.sin()), x.sum(-1, keepdim=True)).tanh(), "forward"),
    ],
    ids=["in front", "behind", "with a mask"],
)
def test_a_registered_module_takes_a_norm_over(forward: object, expected: str) -> None:
    outcome = fused(forward, layer=Scored(6, 6))["norm"]
    assert (outcome.action, outcome.into) == (expected, ("layer",))


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize(
    ("forward", "code"),
    [
        (lambda m, x: m.layer(m.norm(x.sin())) + m.layer(x), Reason.SHARED_LAYER),
        (lambda m, x: m.layer(m.norm(x.sin())) + m.layer.gain.sum(), Reason.READ_RAW),
        (lambda m, x: m.layer(x, m.norm(x.sin())), Reason.FURTHER_ARGUMENT),
        (lambda m, x: m.bare(m.norm(x.sin())), Reason.NO_BIAS),
        (lambda m, x: m.layer(m.norm(x.sin()).mT.reshape(2, 4, 6)), Reason.CHANNELS_SPREAD),
    ],
    ids=["called twice", "read raw", "as a mask", "its own check", "channels elsewhere"],
)
def test_a_registered_module_is_refused_where_a_layer_of_torch_would_be(forward: object, code: Reason) -> None:
    outcome = fused(forward, layer=Scored(6, 6), bare=Scored(6, 6, bias=False))["norm"]
    assert (outcome.action, outcome.codes[0]) == ("kept", code)


def test_wrong_algebra_is_found_by_the_trial() -> None:
    class Wrong(ScoredConsumer):
        def take_input(self, tensors: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"direction": tensors["direction"] * scale}

    registered = register_consumer(Wrong)
    try:
        outcome = fused(lambda m, x: m.layer(m.norm(x.sin())), layer=Scored(6, 3))["norm"]
    finally:
        registered.remove()
    assert (outcome.action, outcome.codes) == ("kept", (Reason.OUTPUT_CHANGES,))


@pytest.mark.parametrize("name", ["offset", "bias"])
def test_tensors_that_a_module_does_not_have_are_refused(name: str) -> None:
    class Wrong(ScoredConsumer):
        def take_input(self, tensors: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {name: scale}

    registered = register_consumer(Wrong)
    try:
        with pytest.raises(ValueError, match=rf"Wrong.take_input gives layer a '{name}' of shape \(6,\), but it has"):
            fused(lambda m, x: m.layer(m.norm(x.sin())), layer=Scored(6, 3))
    finally:
        registered.remove()


@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.layer(swap_halves(m.norm(x.sin()))).tanh(), "forward"),
        (lambda m, x: m.norm(swap_halves(m.layer(x))).tanh(), "backward"),
    ],
    ids=["in front", "behind"],
)
def test_a_norm_folds_through_an_operation_that_moves_channels(forward: object, expected: str) -> None:
    outcome = fused(forward, layer=nn.Linear(6, 6))["norm"]
    assert (outcome.action, outcome.into) == (expected, ("layer",))


def test_an_operation_that_is_a_layer_takes_a_norm_over() -> None:
    registered = register_consumer(ProjectConsumer)
    try:
        forward = lambda m, x: project(m.norm(x.sin()), m.layer.weight, m.layer.bias)  # noqa: E731
        assert fused(forward, layer=nn.Linear(6, 3))["norm"].into == ("layer",)
    finally:
        registered.remove()


def test_what_is_removed_twice_is_gone_once() -> None:
    for _ in range(2):
        registered = register_consumer(ScoredConsumer)
        with pytest.raises(ValueError, match=r"Scored has a consumer already; remove\(\) that one first"):
            register_consumer(ScoredConsumer)
        registered.remove()
        registered.remove()
