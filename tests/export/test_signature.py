"""How a model is called: names, shapes and dtypes of what goes in and comes out, and what a call is refused for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slabformer.export.signature import FlatCall, Signature, flatten, in_order, like


@dataclass
class Output:
    logits: Tensor
    states: tuple[Tensor, ...]


class Model(nn.Module):
    def forward(self, tokens: Tensor, mask: Tensor) -> Output:
        return Output(tokens * mask, (tokens, mask))


X, MASK = torch.randn(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("model", "inputs", "names", "outputs", "returns"),
    [
        (nn.Identity(), X, ["images"], ["logits"], "tensor"),
        (Model(), (X, MASK), ["tokens", "mask"], ["logits", "states_0", "states_1"], "mapping"),
        (Model(), {"mask": MASK, "tokens": X}, ["mask", "tokens"], ["logits", "states_0", "states_1"], "mapping"),
    ],
    ids=["one", "positions", "names"],
)
def test_inputs_and_outputs_have_names(model: nn.Module, inputs: Any, names: Any, outputs: Any, returns: str) -> None:
    signature, flat = flatten(model.eval(), inputs)
    assert [port.name for port in signature.inputs] == names
    assert [port.name for port in signature.outputs] == outputs
    assert signature.returns == returns
    tensors = flat(*in_order(inputs))
    assert len(tensors) == len(outputs)
    assert torch.equal(tensors[0], X)


def test_a_sequence_comes_back_as_a_tuple() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, -x]

    signature, flat = flatten(Two().eval(), X)
    one, other = signature.arrange(flat(X))
    assert torch.equal(one, -other)


def signature() -> Signature:
    return flatten(Model().eval(), (X, MASK))[0]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "said"),
    [
        ((X,), {}, TypeError, "the inputs are tokens, mask; got 1 by position and none by name"),
        ((X, MASK), {"other": X}, TypeError, "got 2 by position and other by name"),
        ((X, MASK), {"mask": X}, TypeError, "got 2 by position and mask by name"),
        ((X, 3), {}, TypeError, "mask must be a tensor, got int"),
        ((X, MASK[:, :2]), {}, ValueError, r"mask must be float32 \(batch, 3\), got float32 \(2, 2\)"),
        ((X.double(), MASK), {}, ValueError, r"tokens must be float32 \(batch, 3\), got float64 \(2, 3\)"),
        ((X, MASK[:1]), {}, ValueError, r"inputs must share one batch size of at least 1, got \[1, 2\]"),
        ((X[:0], MASK[:0]), {}, ValueError, r"at least 1, got \[0\]"),
    ],
    ids=["few", "many", "twice", "kind", "shape", "dtype", "batches", "empty"],
)
def test_other_calls_are_refused_in_words(args: Any, kwargs: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        signature().bind(args, kwargs)


def test_calls_by_name_and_position_are_one(tmp_path: Any) -> None:
    (a, b), (c, d) = signature().bind((X,), {"mask": MASK}), signature().bind((), {"mask": MASK, "tokens": X})
    assert a is c is X
    assert b is d is MASK


def test_what_is_no_tensor_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="mask is float"):
        flatten(Model().eval(), {"tokens": X, "mask": 1.0})  # type: ignore[dict-item]

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "x"

    with pytest.raises(TypeError, match="Nothing returns no tensor"):
        flatten(Nothing().eval(), X)


def test_an_input_whose_first_axis_is_no_batch_keeps_its_shape() -> None:
    ports = flatten(Model().eval(), (X, torch.ones(1, 3)))[0].inputs
    assert [port.shape for port in ports] == [("batch", 3), (1, 3)]
    assert [port.shape for port in flatten(nn.Identity().eval(), X, batch=False)[0].inputs] == [(2, 3)]


@pytest.mark.parametrize("inputs", [X, (X, MASK), {"a": X}], ids=["tensor", "tuple", "mapping"])
def test_tensors_find_their_places_again(inputs: Any) -> None:
    again = like(inputs, in_order(inputs))
    assert type(again) is type(inputs)
    assert FlatCall(nn.Identity()).over(nn.Identity()).keywords == ()
