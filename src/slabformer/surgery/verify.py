"""Hold two models against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.surgery.batches import eval_mode


class VerificationError(RuntimeError):
    """Two models that should compute the same do not."""


@dataclass(frozen=True)
class VerifyResult:
    """How far a candidate's outputs are from the reference's.

    Attributes:
        max_abs: Largest absolute difference.
        max_rel: The same over the root mean square of the reference's outputs.
        top1_agreement: Share of rows whose largest entry along the last axis of the first output is the same.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float


def verify(reference: nn.Module, candidate: nn.Module, inputs: Any, rtol: float = 1e-5) -> VerifyResult:
    """Compare the outputs of two models in eval mode on ``inputs``; modes are restored afterwards.

    Args:
        reference: What is right.
        candidate: What should equal it, a fused or compiled form for example.
        inputs: A tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of such.
        rtol: Largest difference that passes, relative to the root mean square of the reference's outputs.

    Returns:
        The differences, the worst over ``inputs``.

    Raises:
        VerificationError: If ``max_rel`` is above ``rtol``, an output is not finite in one model only, or structures or
            shapes of the outputs differ.
        ValueError: If there is nothing to compare.
    """
    cases = inputs if isinstance(inputs, list) else [inputs]
    if not cases:
        raise ValueError("verify needs at least one input, got an empty list")
    worst_abs, worst_rel, agreements = 0.0, 0.0, []
    with torch.no_grad(), eval_mode(reference), eval_mode(candidate):
        for case in cases:
            outputs = _outputs(reference, case), _outputs(candidate, case)
            if len(outputs[0]) != len(outputs[1]):
                raise VerificationError(f"outputs differ in number: {len(outputs[0])} and {len(outputs[1])} tensors")
            pairs = list(zip(*outputs, strict=True))
            for expected, actual in pairs:
                largest, relative = _difference(expected, actual)
                worst_abs, worst_rel = max(worst_abs, largest), max(worst_rel, relative)
            expected, actual = pairs[0]
            agreements.append((expected.argmax(-1) == actual.argmax(-1)).double().mean().item())
    result = VerifyResult(worst_abs, worst_rel, sum(agreements) / len(agreements))
    if not worst_rel <= rtol:
        raise VerificationError(
            f"outputs differ by {worst_rel:.3g} of the reference's scale (at most {rtol:.3g} allowed; largest absolute "
            f"difference {worst_abs:.3g}, top-1 agreement {result.top1_agreement:.1%})"
        )
    return result


def _outputs(model: nn.Module, case: Any) -> list[Tensor]:
    if isinstance(case, Tensor):
        output = model(case)
    elif isinstance(case, Mapping):
        output = model(**case)
    else:
        output = model(*case)
    tensors = [tensor for tensor in _flatten(output) if tensor.dtype.is_floating_point]
    if not tensors:
        raise ValueError(f"{type(model).__name__} returned no floating point tensor to compare")
    return tensors


def _flatten(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    if hasattr(output, "__iter__") and not isinstance(output, (str, bytes)):
        return [tensor for item in output for tensor in _flatten(item)]
    return []


def _difference(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    if expected.shape != actual.shape:
        raise VerificationError(f"outputs differ in shape: {tuple(expected.shape)} and {tuple(actual.shape)}")
    expected, actual = expected.double(), actual.to(expected.device).double()
    finite = expected.isfinite() & actual.isfinite()
    unlike = ~finite & (expected != actual) & ~(expected.isnan() & actual.isnan())
    if unlike.any():
        raise VerificationError(f"{int(unlike.sum())} outputs are finite in one model only, or infinite in another way")
    expected, actual = expected[finite], actual[finite]
    if not expected.numel():
        return 0.0, 0.0
    largest = (expected - actual).abs().max().item()
    scale = expected.square().mean().sqrt().item()
    return largest, largest / scale if scale else float("inf") if largest else 0.0
