"""Try folds on a twin before the model is touched, and find those that change the outputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slabformer.surgery.fuse.fold import Solution, commit, solve
from slabformer.surgery.fuse.norms import Norm
from slabformer.surgery.fuse.plan import Edit, Plan
from slabformer.surgery.fuse.twin import Example, deployed_twin, first_line, run

logger = logging.getLogger(__name__)

#: largest difference over the RMS of an output. Twins run in float64, where only float32 islands inside a forward leave
#: more than 1e-12; the others are for models that cannot run in float64 (kernels, devices, memory)
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class Trial:
    """A model's outputs on the examples, and whether a plan leaves them as they are.

    Raises:
        ValueError: If the model does not run on an example.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example]) -> None:
        self.model, self.norms = model, norms
        try:
            self._run_reference([example.map(_widen) for example in examples], torch.float64)
        except Exception as error:
            logger.debug("no trial in float64: %s", first_line(error))
            try:
                self._run_reference(examples, None)
            except Exception as own:
                raise ValueError(f"the model does not run on the example inputs: {first_line(own)}") from own

    def _run_reference(self, examples: Sequence[Example], dtype: torch.dtype | None) -> None:
        self.reference = self._outputs(deployed_twin(self.model, dtype), examples)
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
            outputs = self._outputs(candidate, self.examples)
        except Exception as error:
            logger.debug("the fused model fails: %s", first_line(error))
            return False
        return all(equal(a, b) for a, b in zip(self.reference, outputs, strict=True))

    @staticmethod
    def _outputs(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
        return [tensor for example in examples for tensor in run(model, example)]


def _widen(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def equal(expected: Tensor, actual: Tensor) -> bool:
    """Whether two outputs are the same within the tolerance of their dtype."""
    if expected.shape != actual.shape or not torch.equal(expected.isfinite(), actual.isfinite()):
        return False
    finite = expected.isfinite()
    tolerance = TOLERANCES.get(expected.dtype, 1e-3)
    expected, actual = expected[finite].double(), actual[finite].double()
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
