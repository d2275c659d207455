from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slabformer import VerificationError, verify

X = torch.tensor([[3.0, -4.0], [1.0, 2.0]])
LABELS = torch.tensor([1, 0, 2, 0])


class Fixed(nn.Module):
    """Returns what it was built with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


def test_equal_models_pass() -> None:
    model = nn.Linear(2, 3)
    result = verify(model, model, X)
    assert (result.max_abs, result.max_rel, result.top1_agreement, result.unequal) == (0.0, 0.0, 1.0, 0.0)
    assert 0 < result.own_error < 1e-6
    assert result.allowed == 1e-5


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
        (X, X[:1], "output differs in shape"),
        (X, (X, X), r"structure: the reference alone has output, the candidate alone output\[0\], output\[1\]"),
        ((X, X), X, "differ in structure"),
        ({"a": X}, {"b": X}, r"the reference alone has output\['a'\], the candidate alone output\['b'\]"),
        ((X, X), (X, X + 1), r"outputs differ by .* in output\[1\]"),
        (X, X.double(), "output differs in dtype: torch.float32 and torch.float64"),
        (X, X.long(), "differs in dtype: torch.float32 and torch.int64"),
        (LABELS, LABELS.int(), "differs in dtype: torch.int64 and torch.int32"),
        (LABELS, torch.tensor([1, 0, 2, 1]), r"outputs differ: 25.00% of the entries of an integer or boolean"),
        (LABELS > 0, LABELS >= 0, "outputs differ: 50.00%"),
        ((X, LABELS), (X, LABELS + 1), r"outputs differ in output\[1\]: 100.00%"),
        ({"a": [X, 3]}, {"a": [X, 4]}, r"outputs differ in output\['a'\]\[1\]"),
        ((X, "cat"), (X, "dog"), r"output\[1\] differs: 'cat' and 'dog'"),
        ((X, None), (X, X), r"structure: .* alone"),
        (torch.complex(X, X), torch.complex(X, X + 1), "outputs differ by"),
        (X, X.masked_fill(X == 2, float("nan")), "1 entries of output are finite in one model only"),
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
        torch.zeros(2, 3),
        torch.tensor(1.0),
        {"logits": X, "hidden": (X, [X]), "name": "text", "count": 3},
        X.half(),
        LABELS,
        LABELS > 0,
        [1, 0, 2],
        {"labels": LABELS, "none": X[:0]},
        torch.complex(X, X),
        X.to_sparse(),
        X.numpy(),
    ],
    ids=lambda value: type(value).__name__,
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


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("text", "no tensor with entries"),
        (None, "no tensor with entries"),
        ([X[:0], LABELS[:0]], "no tensor with entries"),
        (X * float("nan"), "output of Fixed is NaN in 4 of 4 entries for input 0"),
        (X.masked_fill(X == 2, float("nan")), "output of Fixed is NaN in 1 of 4 entries"),
        ({"a": X, "b": X * float("nan")}, r"output\['b'\] of Fixed is NaN"),
        (X * float("inf"), "output of Fixed is infinite in every entry"),
    ],
    ids=lambda value: None,
)
def test_nothing_to_compare_is_an_error(output: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        verify(Fixed(output), Fixed(output), X)


def test_no_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one input"):
        verify(Fixed(X), Fixed(X), [])


@pytest.mark.parametrize("rtol", [-1.0, float("nan")])
def test_a_tolerance_below_0_is_an_error(rtol: float) -> None:
    with pytest.raises(ValueError, match="rtol must be "):
        verify(Fixed(X), Fixed(X), X, rtol)


class Cancelling(nn.Module):
    """A model whose float32 outputs are mostly rounding: it adds and takes away a large number."""

    def __init__(self, shift: float, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + self.shift) - self.shift


class Both(nn.Module):
    """An output that is all rounding, and one that is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.rough, self.exact = Cancelling(1e4), Cancelling(0.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"rough": self.rough(x), "exact": self.exact(x)}


class Ending(nn.Module):
    """What ``of`` makes of a model's output."""

    def __init__(self, model: nn.Module, of: Any) -> None:
        super().__init__()
        self.model, self.of = model, of

    def forward(self, x: Tensor) -> Any:
        return self.of(self.model(x))


def moved(model: nn.Module, layer: str, by: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(layer).bias += by
    return other


def tokens(rows: int = 64) -> Tensor:
    return torch.randn(rows, 8)


def test_a_difference_above_the_tolerance_is_refused() -> None:
    model = Cancelling(0.0)
    with pytest.raises(VerificationError, match=r"at most 1e-05 allowed: rtol is 1e-05, the reference's own rounding"):
        verify(model, moved(model, "layer", 1e-3), tokens())


def test_an_ill_conditioned_model_may_differ_by_what_float32_costs_it() -> None:
    model = Cancelling(1e4)
    result = verify(model, moved(model, "layer", 4e-4), tokens())
    assert 1e-5 < result.max_rel <= result.allowed == 4 * result.own_error < 1e-2
    assert f"own rounding error is {result.own_error:.1e}" in str(result)


def test_an_ill_conditioned_model_may_not_differ_by_more_than_4_times_that() -> None:
    model, x = Cancelling(1e4), tokens()
    own = verify(model, model, x).own_error
    scale = model(x).square().mean().sqrt().item()
    verify(model, moved(model, "layer", 1.5 * own * scale), x)
    with pytest.raises(VerificationError, match="outputs differ"):
        verify(model, moved(model, "layer", 8 * own * scale), x)


def test_each_output_is_judged_by_its_own_rounding() -> None:
    model, x = Both(), tokens()
    verify(model, moved(model, "rough.layer", 4e-4), x)
    with pytest.raises(VerificationError, match=r"in output\['exact'\]"):
        verify(model, moved(model, "exact.layer", 4e-4), x)


def test_a_single_number_is_judged_by_the_rounding_of_all_outputs() -> None:
    model, x = Cancelling(1e4), tokens()
    # the mean is exact in float64 by luck, as a loss may be
    both = Ending(model, lambda out: (out, torch.ones(()) + 4e-4 * (out.sum() - out.sum())))
    other = Ending(model, lambda out: (out, torch.ones(()) + 4e-4))
    assert verify(both, other, x).max_rel > 1e-5


def test_no_rounding_allows_a_model_that_returns_something_else() -> None:
    model = Cancelling(1e7)  # nothing but rounding is left of it
    with pytest.raises(VerificationError, match=r"at most 0\.5 allowed"):
        verify(model, Cancelling(1e7), tokens())


def test_labels_may_turn_where_they_turn_in_float64_and_nowhere_else() -> None:
    rough, exact = (Ending(Cancelling(shift), lambda out: out.argmax(-1)) for shift in (1e5, 0.0))
    x = tokens(4000)
    assert 0 < verify(rough, moved(rough, "model.layer", torch.randn(8) * 4e-4), x).unequal < 0.05
    with pytest.raises(VerificationError, match=r"at most 0.00% allowed"):
        verify(exact, moved(exact, "model.layer", torch.randn(8) * 1e-2), x)


def test_a_model_that_does_not_run_in_float64_is_judged_by_rtol_alone() -> None:
    def refuse(out: Tensor) -> Tensor:
        if out.dtype == torch.float64:
            raise NotImplementedError("no kernel")
        return out

    model = Ending(Cancelling(1e4), refuse)
    result = verify(model, model, tokens())
    assert result.own_error is None
    assert result.note == "the reference does not run in float64 (NotImplementedError: no kernel), so rtol alone counts"
    with pytest.raises(VerificationError, match="no kernel"):
        verify(model, moved(model, "model.layer", 4e-4), tokens())


def test_a_model_that_draws_random_numbers_is_given_the_same_and_no_rounding() -> None:
    model = Ending(Cancelling(0.0), lambda out: out + torch.randn_like(out))
    x, before = tokens(), torch.get_rng_state()
    assert verify(model, model, x).max_rel == 0
    with pytest.raises(VerificationError, match="other outputs for other random numbers"):
        verify(model, moved(model, "model.layer", 1e-3), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_float64_runs_only_where_needed_if_asked_so() -> None:
    model, x = Cancelling(1e4), tokens()
    assert verify(model, model, x, lazy=True).own_error is None
    assert verify(model, moved(model, "layer", 4e-4), x, lazy=True).own_error > 0


def test_half_precision_may_stand_for_float32_if_asked_so_but_no_integer() -> None:
    assert verify(Fixed(X), Fixed(X.half()), X, check_dtype=False).max_abs == 0
    with pytest.raises(VerificationError, match="differs in dtype"):
        verify(Fixed(X), Fixed(X.long()), X, check_dtype=False)


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
