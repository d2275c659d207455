"""What fuse refuses, in words, before anything changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fusing import net, norm, tokens
from slabformer.nn import PRepBN
from slabformer.surgery.fuse import fuse, fuse_

X = tokens(2, 4, 6)


def simple(**children: nn.Module) -> nn.Module:
    return net(lambda m, x: m.linear(m.norm(x)), **{"norm": norm(), "linear": nn.Linear(6, 3), **children})


def with_gamma(value: float) -> nn.Module:
    model = simple(norm=PRepBN(6))
    model.norm.set_gamma(value)
    return model


def with_mode_of_child() -> nn.Module:
    model = simple()
    model.linear.train()
    return model


def compiled_child() -> nn.Module:
    model = simple()
    model.linear = torch.compile(model.linear, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = simple()
    model.compile(backend="eager")
    return model


def with_int8_weight() -> nn.Module:
    model = simple()
    model.linear.weight = nn.Parameter(torch.ones(3, 6, dtype=torch.int8), requires_grad=False)
    return model


def with_lazy_weight() -> nn.Module:
    model = simple()
    model.linear = nn.LazyLinear(3).eval()
    return model


def with_subclass() -> nn.Module:
    class Sharded(torch.Tensor):
        pass

    model = simple()
    model.linear.weight = nn.Parameter(torch.randn(3, 6).as_subclass(Sharded))
    return model


MODELS = {
    "train mode": (
        lambda: simple().train(),
        "fuse needs eval mode, got a model in train mode; call model.eval() first",
    ),
    "mixed modes": (with_mode_of_child, "fuse needs eval mode, but linear is in train mode"),
    "fading": (
        lambda: with_gamma(0.25),
        "norm still holds its norm (gamma is 0.25); finish the schedule, take the model's gamma",
    ),
    "fresh": (lambda: with_gamma(1.0), "norm still holds its norm (gamma is 1)"),
    "no norms": (lambda: simple(norm=nn.LayerNorm(6)), "no RepBN, PRepBN, BatchNorm or Affine to fuse in Net"),
    "norm alone": (lambda: norm().eval(), "the model itself is a RepBN; wrap it"),
    "DataParallel": (lambda: nn.DataParallel(simple()).eval(), "wrapped in DataParallel; pass model.module"),
    "compiled": (lambda: torch.compile(simple(), backend="eager"), "it is compiled; pass model._orig_mod"),
    "compiled child": (compiled_child, "fuse cannot edit linear: it is compiled"),
    "meta": (lambda: simple().to("meta"), "is on the meta device and has no values; load the weights first"),
    "lazy": (with_lazy_weight, "linear.weight has no shape yet; run the model once first"),
    "int8": (with_int8_weight, "linear.weight is quantised (torch.int8); fuse first, quantise afterwards"),
    "subclass": (with_subclass, "linear.weight is a Sharded; fuse needs plain tensors"),
    "wrong width": (
        lambda: simple(linear=nn.Linear(5, 3)),
        "the model does not run on the example inputs: RuntimeError",
    ),
    "uncopyable": (
        lambda: simple(linear=Uncopyable(6, 3)),
        "cannot be copied, which fuse needs: TypeError: one of a kind",
    ),
}


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Uncopyable":
        raise TypeError("one of a kind")


@pytest.mark.parametrize("call", [fuse, fuse_], ids=["fuse", "fuse_"])
@pytest.mark.parametrize(("build", "message"), MODELS.values(), ids=MODELS)
def test_fuse_refuses_the_model(build: Any, message: str, call: Any) -> None:
    model = build()
    modules = list(model.named_modules())
    with pytest.raises(ValueError) as caught:
        call(model, X)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.named_modules()) == modules


def test_fuse_copies_what_was_compiled_in_place_and_fuse_in_place_refuses_it() -> None:
    model = compiled_in_place()
    with pytest.raises(ValueError, match="is compiled in place; use fuse"):
        fuse_(model, X)
    assert fuse(model, X)[1].num_folded == 1


def test_allow_gamma_fuses_what_runs_in_eval_mode() -> None:
    model = with_gamma(0.25)
    result, report = fuse(model, X, allow_gamma=True)
    assert report.num_folded == 1
    assert torch.allclose(result(X), model(X), rtol=1e-9, atol=1e-9)


EXAMPLES = {
    "array": ([[1.0]], "got list"),
    "dict": ({"x": X}, "got dict; pass a dict as example_kwargs"),
    "None": (None, "got NoneType"),
    "number": (3, "got int"),
}


@pytest.mark.parametrize(("example", "message"), EXAMPLES.values(), ids=EXAMPLES)
def test_fuse_refuses_example_inputs_of_the_wrong_kind(example: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        fuse(simple(), example)
    assert message in str(caught.value)


def test_fuse_refuses_example_kwargs_that_are_no_dict() -> None:
    with pytest.raises(TypeError, match="example_kwargs must be a dict"):
        fuse(simple(), X, [X])  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [[], ()], ids=["list", "tuple"])
def test_fuse_refuses_to_guess_inputs(example: Any) -> None:
    with pytest.raises(ValueError, match="fuse needs"):
        fuse(simple(), example)


def test_fuse_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="Module, got function"):
        fuse(lambda x: x, X)  # type: ignore[arg-type]


def damaged(change: Callable[[nn.Module], object], of: Callable[[], nn.Module] = norm) -> nn.Module:
    model = simple(norm=of())
    with torch.no_grad():
        change(model.norm.rep if isinstance(model.norm, PRepBN) else model.norm)
    return model


def faded() -> nn.Module:
    made = PRepBN(6)
    made.set_gamma(0)
    return made


@pytest.mark.parametrize("of", [norm, faded], ids=["RepBN", "PRepBN"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: n.running_var[2:4].fill_(float("inf")), "not finite: the variance of 2 of 6 channels .* channel 2"),
        (lambda n: n.running_mean[:1].fill_(float("nan")), "not finite: the mean of 1 of 6 channels"),
        (lambda n: n.running_var[5:].fill_(-1e-9), "negative: the variance of 1 of 6 channels .* channel 5"),
        (lambda n: n.weight[:1].fill_(float("nan")), "norm: weight, bias or eta is not finite"),
        (lambda n: n.bias[:1].fill_(float("inf")), "norm: weight, bias or eta is not finite"),
        (lambda n: n.eta.fill_(float("nan")), "norm: weight, bias or eta is not finite"),
    ],
    ids=["variance", "mean", "negative", "weight", "bias", "eta"],
)
def test_statistics_that_no_data_has_are_refused(change, said, of):
    model = damaged(change, of)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        fuse_(model, X)
    assert all(torch.equal(tensor, before[name]) or tensor.isnan().any() for name, tensor in model.state_dict().items())


def test_those_of_a_batch_norm_are_refused_too():
    model = net(lambda m, x: m.conv(m.norm(x)), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 1))
    model.norm.running_var[1] = float("inf")
    with pytest.raises(ValueError, match="statistics of norm are not finite: the variance of 1 of 4 channels"):
        fuse(model, tokens(2, 4, 5, 5))


def test_channels_that_never_varied_are_named(caplog):
    model = damaged(lambda n: n.running_var[1:3].zero_())
    _, report = fuse(model, X)
    assert report.num_kept == 0
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "running variance is 0 in 2 of 6 channels of norm: their input never varied" in record.getMessage()


def test_a_norm_in_order_is_fused_without_a_word(caplog):
    fuse(simple(), X)
    assert not caplog.records


@pytest.mark.parametrize(
    ("value", "said"), [(float("inf"), "not finite: the variance"), (-1.0, "negative: the variance")], ids=str
)
def test_a_norm_by_itself_refuses_to_fuse_them(value, said):
    layer = norm()
    layer.running_var[0] = value
    with pytest.raises(ValueError, match=f"statistics of RepBN are {said} of 1 of 6 channels"):
        layer.fuse()
