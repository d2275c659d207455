"""Hold two models against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._defaults import RTOL
from slabformer._process import alone
from slabformer._torch import uncompiled
from slabformer.ops.precision import wide, widened, widened_on_use
from slabformer.settings import NonNegativeFloat, checked
from slabformer.surgery.batches import eval_mode
from slabformer.surgery.fuse.tree.copies import Example, copy_model
from slabformer.surgery.normal import need_values
from slabformer.surgery.outputs import Plain, first_line, leaves, why_not_comparable

#: two computations of one function round apart: how many of its own distances to float64 they may lie apart
OWN_ERRORS_ALLOWED = 4
#: but never more than this share of the scale, or of the entries: so loose an agreement says nothing
MOST_ALLOWED = 0.5
#: an output of fewer entries may be near float64 by luck: it is judged by the largest distance of all outputs
FEW_ENTRIES = 32

Outputs = Mapping[str, Tensor | Plain]


class VerificationError(RuntimeError):
    """Two models that should compute the same do not."""


@dataclass(frozen=True)
class VerifyResult:
    """How far a candidate's outputs are from the reference's, the worst over all inputs and outputs.

    Attributes:
        max_abs: Largest absolute difference of a floating point output.
        max_rel: The same over the root mean square of that output of the reference.
        top1_agreement: Share of rows whose largest entry along the last axis of the first floating point output is the
            same; without such an output, share of entries that are.
        unequal: Largest share of entries of an integer or boolean output that differ.
        own_error: Largest distance of a floating point output of the reference to its copy in float64, relative as
            ``max_rel`` is; None where it was not measured.
        allowed: What was allowed of the output that came closest to it, relative too.
        note: Why ``own_error`` was not measured; empty where it was.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float
    unequal: float = 0.0
    own_error: float | None = None
    allowed: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"outputs within {self.max_rel:.1e} of their scale; {self.own_words()}"

    def own_words(self) -> str:
        """The reference's own error, or why it is not known."""
        return self.note if self.own_error is None else f"the reference's own rounding error is {self.own_error:.1e}"


@checked
def verify(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Any,
    rtol: NonNegativeFloat = RTOL,
    *,
    check_dtype: bool = True,
    lazy: bool = False,
) -> VerifyResult:
    """Compare the outputs of two models in eval mode on ``inputs``; modes and random generators are restored.

    Every tensor, number and text in the outputs is compared. A floating point output may differ by ``rtol``, or by 4
    times its own distance to what a copy of the reference in float64 returns: float32 alone moves the outputs of some
    models by percents. Integers and booleans must be equal, but for 4 times the share of them that float64 changes.

    Args:
        reference: What is right; a copy of it in float64 runs too, and where that fails, ``rtol`` alone counts.
        candidate: What should equal it, a fused or compiled form for example.
        inputs: A tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of such.
        rtol: Difference that passes in any case, relative to the root mean square of the reference's output.
        check_dtype: Whether dtypes must be the same; otherwise float16 may stand for float32, but no integer for it.
        lazy: Run in float64 only if a difference is above ``rtol``.

    Returns:
        The differences, the worst over ``inputs``.

    Raises:
        VerificationError: If outputs differ by more, in structure, shape or dtype, or are finite in one model only.
        ValueError: If a model is on the meta device, or there is nothing to compare: no input, no tensor in the
            outputs, or an output of the reference that holds NaN or nothing finite.
    """
    cases = inputs if isinstance(inputs, list) else [inputs]
    if not cases:
        raise ValueError("verify needs at least one input, got an empty list")
    for model in (reference, candidate):
        need_values(model)
    with torch.no_grad(), eval_mode(reference), eval_mode(candidate):
        expected = [_run(reference, case) for case in cases]
        _check_comparable(type(reference).__name__, expected)
        actual = [_run(candidate, case) for case in cases]
        for one, other in zip(expected, actual, strict=True):
            _check_alike(one, other, check_dtype)
        distances = _distances(expected, actual)
        exceeded = any(each.relative > (rtol if each.is_float else 0) for each in distances.values())
        own: dict[str, _Distance] = {}
        note = "the reference's own rounding error was not needed"
        if exceeded or not lazy:
            own, note = _own_errors(reference, cases, expected)
        if exceeded and own and _is_random(reference, cases[0], expected[0]):
            own, note = {}, "the reference returns other outputs for other random numbers"
    floats = [name for name, each in distances.items() if each.is_float]
    integers = [name for name, each in distances.items() if not each.is_float]
    allowed = {name: _allowed(name, distances[name], own, rtol) for name in distances}
    closest = max(distances, key=lambda name: distances[name].over(allowed[name]))
    result = VerifyResult(
        max_abs=max((distances[name].absolute for name in floats), default=0.0),
        max_rel=max((distances[name].relative for name in floats), default=0.0),
        top1_agreement=_agreement(expected, actual),
        unequal=max((distances[name].relative for name in integers), default=0.0),
        own_error=max((own[name].relative for name in floats), default=0.0) if own else None,
        allowed=allowed[closest],
        note=note,
    )
    if distances[closest].over(allowed[closest]) > 1:
        raise VerificationError(_difference(closest, distances[closest], result, rtol))
    return result


@dataclass(frozen=True)
class _Distance:
    """Of one output to what is expected; ``relative`` is the share of unequal entries where it holds integers."""

    is_float: bool
    entries: int
    absolute: float
    relative: float

    @classmethod
    def of(cls, expected: Tensor, actual: Tensor) -> _Distance:
        """Over the entries that are finite in both."""
        actual = actual.to(expected.device)
        if not expected.dtype.is_floating_point:
            share = (expected != actual).sum().item() / expected.numel() if expected.numel() else 0.0
            return cls(False, expected.numel(), 0.0, share)
        expected, actual = wide(expected), wide(actual)
        finite = expected.isfinite() & actual.isfinite()
        expected, actual = expected[finite], actual[finite]
        if not expected.numel():
            return cls(True, 0, 0.0, 0.0)
        largest = (expected - actual).abs().max().item()
        scale = expected.square().mean().sqrt().item()
        return cls(True, expected.numel(), largest, largest / scale if scale else float("inf") if largest else 0.0)

    def over(self, allowed: float) -> float:
        """How much of what is allowed it takes up: above 1 is too much."""
        if self.relative <= allowed:
            return self.relative / allowed if allowed else 0.0
        return self.relative / allowed if allowed else float("inf")


def _distances(expected: Sequence[Outputs], actual: Sequence[Outputs]) -> dict[str, _Distance]:
    """Of every output that is a tensor, the worst over all cases."""
    found: dict[str, list[_Distance]] = {}
    for one, other in zip(expected, actual, strict=True):
        for name, tensor in _tensors(one).items():
            found.setdefault(name, []).append(_Distance.of(tensor, _tensors(other)[name]))
    return {
        name: _Distance(
            each[0].is_float,
            sum(distance.entries for distance in each),
            max(distance.absolute for distance in each),
            max(distance.relative for distance in each),
        )
        for name, each in found.items()
    }


def _own_errors(
    reference: nn.Module, cases: Sequence[Any], expected: Sequence[Outputs]
) -> tuple[dict[str, _Distance], str]:
    """Distances of a copy in float64 to the outputs of ``reference`` itself, or nothing and why."""
    try:
        double = _in_float64(reference)
        outputs = [_run(double, case, torch.float64) for case in cases]
        for one, other in zip(outputs, expected, strict=True):
            _check_shapes(one, other)
        return _distances(outputs, expected), ""
    except Exception as error:  # a model's forward may raise anything
        return {}, f"the reference does not run in float64 ({first_line(error)}), so rtol alone counts"


def _in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64, on a CPU where the device of ``model`` has none."""
    return copy_model(uncompiled(model), widened_on_use)


def _is_random(model: nn.Module, case: Any, expected: Outputs) -> bool:
    return any(each.relative > RTOL for each in _distances([expected], [_run(model, case, seed=1)]).values())


def _allowed(name: str, distance: _Distance, own: Mapping[str, _Distance], rtol: float) -> float:
    if not own:
        return rtol if distance.is_float else 0.0
    error = own[name].relative
    if not distance.is_float:
        return min(OWN_ERRORS_ALLOWED * error, MOST_ALLOWED)
    if distance.entries < FEW_ENTRIES:
        error = max(each.relative for each in own.values() if each.is_float)
    return max(rtol, min(OWN_ERRORS_ALLOWED * error, MOST_ALLOWED))


def _run(model: nn.Module, case: Any, dtype: torch.dtype | None = None, seed: int = 0) -> Outputs:
    """Outputs by their place, with the same random numbers in every model."""
    args, kwargs = ((), case) if isinstance(case, Mapping) else ((case,) if isinstance(case, Tensor) else case, {})
    example = Example(tuple(args), kwargs)
    if dtype is not None:
        example = example.map(widened)
    with alone, torch.random.fork_rng({tensor.device for tensor in example.tensors() if tensor.is_cuda}):
        torch.manual_seed(seed)
        return leaves(model(*example.args, **example.kwargs))


def _tensors(outputs: Outputs) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in outputs.items() if isinstance(leaf, Tensor)}


def _check_comparable(model: str, cases: Sequence[Outputs]) -> None:
    if not any(tensor.numel() for outputs in cases for tensor in _tensors(outputs).values()):
        raise ValueError(f"{model} returned no tensor with entries: there is nothing to compare")
    for index, outputs in enumerate(cases):
        for name, tensor in _tensors(outputs).items():
            reason = why_not_comparable(tensor)
            if reason:
                raise ValueError(
                    f"output{name} of {model} is {reason} for input {index}: there is nothing to compare; "
                    "give inputs for which it is finite"
                )


def _check_alike(expected: Outputs, actual: Outputs, check_dtype: bool) -> None:
    _check_shapes(expected, actual)
    for name, one in expected.items():
        other = actual[name]
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if one != other:
                raise VerificationError(f"output{name} differs: {one!r} and {other!r}")
            continue
        if one.dtype != other.dtype and (check_dtype or not one.is_floating_point() & other.is_floating_point()):
            raise VerificationError(f"output{name} differs in dtype: {one.dtype} and {other.dtype}")
        if one.dtype.is_floating_point:
            one, other = wide(one), wide(other.to(one.device))
            unlike = ~(one.isfinite() & other.isfinite()) & (one != other)
            if unlike.any():
                raise VerificationError(
                    f"{int(unlike.sum())} entries of output{name} are finite in one model only, "
                    "or infinite in another way"
                )


def _check_shapes(expected: Outputs, actual: Outputs) -> None:
    kinds = [{name: isinstance(leaf, Tensor) for name, leaf in outputs.items()} for outputs in (expected, actual)]
    if kinds[0] != kinds[1]:
        alone = [[f"output{name}" for name in one if name not in other] for one, other in (kinds, kinds[::-1])]
        raise VerificationError(
            f"outputs differ in structure: the reference alone has {', '.join(alone[0]) or 'nothing'}, "
            f"the candidate alone {', '.join(alone[1]) or 'nothing'}"
        )
    for name, tensor in _tensors(expected).items():
        other = _tensors(actual)[name]
        if tensor.shape != other.shape:
            raise VerificationError(f"output{name} differs in shape: {tuple(tensor.shape)} and {tuple(other.shape)}")


def _agreement(expected: Sequence[Outputs], actual: Sequence[Outputs]) -> float:
    shares = []
    for one, other in zip(expected, actual, strict=True):
        filled = {name: tensor for name, tensor in _tensors(one).items() if tensor.numel()}
        name = next((name for name, each in filled.items() if each.is_floating_point()), next(iter(filled), None))
        if name is None:
            continue
        pair = filled[name], _tensors(other)[name].to(filled[name].device)
        tops = [each.argmax(-1) if each.is_floating_point() else each for each in pair]
        shares.append((tops[0] == tops[1]).float().mean().item())
    return sum(shares) / len(shares)


def _difference(name: str, distance: _Distance, result: VerifyResult, rtol: float) -> str:
    where = f" in output{name}" if name else ""
    own = f"rtol is {rtol:.3g}, {result.own_words()}"
    if not distance.is_float:
        return (
            f"outputs differ{where}: {distance.relative:.2%} of the entries of an integer or boolean tensor "
            f"(at most {result.allowed:.2%} allowed)"
        )
    return (
        f"outputs differ by {distance.relative:.3g} of the reference's scale{where} (at most {result.allowed:.3g} "
        f"allowed: {own}; largest absolute difference {distance.absolute:.3g}, "
        f"top-1 agreement {result.top1_agreement:.1%})"
    )
