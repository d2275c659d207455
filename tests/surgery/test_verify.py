from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slabformer import VerificationError, VerifyResult, verify

X = torch.tensor([[3.0, -4.0], [1.0, 2.0]])


class Fixed(nn.Module):
    """Returns what it was built with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


def test_equal_models_pass() -> None:
    model = nn.Linear(2, 3)
    assert verify(model, model, X) == VerifyResult(0.0, 0.0, 1.0)


def test_figures_are_largest_difference_over_rms_and_top1() -> None:
    result = verify(Fixed(X), Fixed(X + torch.tensor([[0.0, 0.0], [1.5, 0.0]])), X, rtol=1.0)
    assert result.max_abs == pytest.approx(1.5)
    assert result.max_rel == pytest.approx(1.5 / (30 / 4) ** 0.5)
    assert result.top1_agreement == 0.5


def test_worst_input_counts() -> None:
    near, far = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(near.weight)
    nn.init.constant_(far.weight, 1.25)
    result = verify(near, far, [torch.ones(1, 1), torch.full((1, 1), 4.0)], rtol=1.0)
    assert result.max_abs == 1.0
    assert result.max_rel == 0.25


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        (X, X * 1.001, "outputs differ by"),
        (X, X[:1], "differ in shape"),
        (X, (X, X), "differ in number: 1 and 2"),
        ((X, X), X, "differ in number: 2 and 1"),
        ((X, X), (X, X + 1), "outputs differ by"),
        (X, X.masked_fill(X == 2, float("nan")), "1 outputs are finite in one model only"),
        (X.masked_fill(X == 2, float("inf")), X, "finite in one model only"),
        (X.masked_fill(X == 2, float("inf")), X.masked_fill(X == 2, float("-inf")), "infinite in another way"),
        (X.masked_fill(X == 2, float("inf")), X.masked_fill(X == 2, float("nan")), "infinite in another way"),
        (torch.zeros(2), torch.full((2,), 1e-30), "outputs differ by inf"),
    ],
    ids=lambda value: None,
)
def test_differences_raise(reference: Any, candidate: Any, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify(Fixed(reference), Fixed(candidate), X)


@pytest.mark.parametrize(
    "output",
    [
        X.masked_fill(X == 2, float("-inf")),
        X.masked_fill(X == 2, float("nan")),
        torch.zeros(2, 3),
        torch.tensor(1.0),
        {"logits": X, "hidden": (X, [X]), "name": "text", "count": 3},
        X.half(),
    ],
    ids=["masked_logits", "nan_alike", "zeros", "scalar", "nested", "half"],
)
def test_equal_outputs_of_any_kind_pass(output: Any) -> None:
    assert verify(Fixed(output), Fixed(output), X).max_abs == 0


@pytest.mark.parametrize(
    "inputs",
    [X, (X,), {"input": X}, [X, X], [(X,), {"input": X}]],
    ids=["tensor", "tuple", "mapping", "list", "mixed_list"],
)
def test_inputs_come_in_any_usual_form(inputs: Any) -> None:
    model = nn.Linear(2, 3)
    assert verify(model, model, inputs).max_abs == 0


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one input"):
        verify(Fixed(X), Fixed(X), [])
    with pytest.raises(ValueError, match="no floating point tensor"):
        verify(Fixed(X.long()), Fixed(X.long()), X)


def test_comparison_runs_in_eval_without_gradients_and_restores_modes() -> None:
    reference, candidate = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)), nn.Sequential(nn.Dropout(0.5)).eval()
    candidate.append(reference[1])
    reference[1].eval()
    verify(reference, candidate, X)
    assert [m.training for m in reference.modules()] == [True, True, False]
    assert [m.training for m in candidate.modules()] == [False, False, False]


def test_modes_are_restored_after_a_failure() -> None:
    reference = Fixed(X).train()
    with pytest.raises(VerificationError):
        verify(reference, Fixed(X + 1).eval(), X)
    assert reference.training
