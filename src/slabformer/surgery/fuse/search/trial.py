"""Try folds on a copy before the model is touched, and find those that change what it computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slabformer.ops.precision import wide, widened
from slabformer.surgery.fuse.search.observe import Observation, observe
from slabformer.surgery.fuse.tree.copies import Example, deployed_twin, twin
from slabformer.surgery.fuse.tree.fold import Solution, commit, solve
from slabformer.surgery.fuse.tree.norms import Norm, find_norms
from slabformer.surgery.fuse.tree.plan import Edit, Plan
from slabformer.surgery.outputs import first_line, why_not_comparable

logger = logging.getLogger(__name__)

#: largest difference over the RMS of an output. Copies run in float64, where only float32 islands inside a forward
#: leave more than 1e-12; the others are for models that cannot run in float64 (kernels, devices, memory)
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: share of integer outputs that may differ where a model cannot run in float64: logits may be equal to rounding
MOST_INTEGERS = 1e-3


class Trial:
    """What a model computes on the examples, and whether a plan leaves it as it is.

    Outputs of every dtype are compared, and what the model decides by: labels stay the same where logits do not.

    Raises:
        ValueError: If the model does not run on an example, or returns nothing there that can be compared.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example]) -> None:
        self.model, self.norms = model, norms
        try:
            self._run_reference([example.map(widened) for example in examples], torch.float64)
        except Exception as error:
            logger.debug("no trial in float64: %s", first_line(error))
            try:
                self._run_reference(examples, None)
            except Exception as own:
                raise ValueError(f"the model does not run on the example inputs: {first_line(own)}") from own
        _check_comparable(self.reference)

    def is_blind(self) -> bool:
        """Whether an output is 0 throughout, as behind a head that starts at 0, so that no fold could change it."""
        tensors = [tensor for each in self.reference for tensor in each.tensors().values() if tensor.numel()]
        return any(tensor.is_floating_point() and not tensor.any() for tensor in tensors)

    def seeing(self, examples: Sequence[Example]) -> Trial | None:
        """The same of a copy whose parameters that are 0 throughout are drawn; None if that shows no more."""
        copied = twin(self.model)
        _draw_zeros_(copied)
        try:
            trial = Trial(copied, find_norms(copied), examples)
        except ValueError:  # drawn values may overflow
            return None
        return None if trial.is_blind() else trial

    def _run_reference(self, examples: Sequence[Example], dtype: torch.dtype | None) -> None:
        self.reference = _observe(deployed_twin(self.model, dtype), examples)
        self.examples, self.dtype = examples, dtype

    def settle(self, plan: Plan) -> Solution:
        """The plan without the folds that change the outputs; ``plan`` is amended with reasons."""
        if not self.holds(plan):
            if not plan.edits or not self._holds([], plan.untouchable):
                self._settle_affines(plan)
            plan.edits = self._settle_edits([], plan.edits, plan)
        return solve(self.model, self.norms, plan.edits)

    def holds(self, plan: Plan) -> bool:
        """Whether a plan leaves the outputs as they are."""
        return self._holds(plan.edits, plan.untouchable)

    def _settle_edits(self, accepted: list[Edit], edits: list[Edit], plan: Plan) -> list[Edit]:
        """``accepted`` and those of ``edits`` that hold beside them, by bisection."""
        if not edits or self._holds(accepted + edits, plan.untouchable):
            return accepted + edits
        if len(edits) == 1:
            plan.reasons[edits[0].norm] = _why(edits[0])
            return accepted
        middle = len(edits) // 2
        accepted = self._settle_edits(accepted, edits[:middle], plan)
        return self._settle_edits(accepted, edits[middle:], plan)

    def _settle_affines(self, plan: Plan) -> None:
        """Leave the norms alone that are not even an Affine to the forward that reads them."""
        for norm in self.norms:
            others = {other.index for other in self.norms if other is not norm} | plan.untouchable
            if not self._holds([], others):
                plan.untouchable.add(norm.index)
                plan.reasons[norm.index] = "left as it is, the output changes when an Affine stands for it"
        plan.edits = [edit for edit in plan.edits if edit.norm not in plan.untouchable]

    def _holds(self, edits: Sequence[Edit], untouchable: set[int]) -> bool:
        solution = solve(self.model, self.norms, edits)
        if solution.overflows(self.model):
            return False
        candidate = deployed_twin(self.model, self.dtype)
        commit(candidate, solution, untouchable)
        try:
            observations = _observe(candidate, self.examples)
        except Exception as error:
            logger.debug("the fused model fails: %s", first_line(error))
            return False
        integers = 0.0 if self.dtype is torch.float64 else MOST_INTEGERS
        return all(is_same(one, other, integers) for one, other in zip(self.reference, observations, strict=True))


@torch.no_grad()
def _draw_zeros_(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


def _observe(model: nn.Module, examples: Sequence[Example]) -> list[Observation]:
    return [observe(model, example) for example in examples]


def _check_comparable(observations: Sequence[Observation]) -> None:
    for index, observation in enumerate(observations):
        tensors = {place: tensor for place, tensor in observation.tensors().items() if tensor.numel()}
        reasons = [f"output{place} is {why}" for place, each in tensors.items() if (why := why_not_comparable(each))]
        if not tensors:
            reasons = ["the model returns no tensor with entries"]
        if reasons:
            raise ValueError(
                f"folds cannot be tried on example input {index}: {reasons[0]}, so there is nothing to compare; "
                "give an example whose outputs are finite"
            )


def is_same(expected: Observation, actual: Observation, integers: float = 0.0) -> bool:
    """Whether a fold leaves outputs and decisions as they are, but for the share ``integers`` of integer entries."""
    if expected.outputs.keys() != actual.outputs.keys() or len(expected.decisions) != len(actual.decisions):
        return False
    pairs = [(leaf, actual.outputs[place]) for place, leaf in expected.outputs.items()]
    return all(
        _equal(one, other, integers) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
        for one, other in (*pairs, *zip(expected.decisions, actual.decisions, strict=True))
    )


def _equal(expected: Tensor, actual: Tensor, integers: float) -> bool:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if not expected.is_floating_point():
        return not expected.numel() or bool((expected != actual).sum() <= integers * expected.numel())
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()) or not torch.equal(
        expected[~finite].nan_to_num(nan=0), actual[~finite].nan_to_num(nan=0)
    ):
        return False
    tolerance = TOLERANCES.get(expected.dtype, 1e-3)
    expected, actual = wide(expected[finite]), wide(actual[finite])
    if not expected.numel():
        return True
    return bool((expected - actual).abs().max() <= tolerance * expected.square().mean().sqrt())


def _why(edit: Edit) -> str:
    names = ", ".join(target.name for target in edit.targets)
    unread = any(target.new_bias for target in edit.targets)
    hint = (
        "the forward does not take the bias that this needs" if unread else "too large for its dtype, or read elsewhere"
    )
    return f"folding it {edit.action} into {names} changes the output: {hint}"
