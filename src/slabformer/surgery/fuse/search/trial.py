"""Try folds on a copy before the model is touched, and find those that change what it computes or decides by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._process import alone
from slabformer._torch import DispatchMode, tree_leaves
from slabformer.ops.precision import wide, widened
from slabformer.surgery.fuse.tree.copies import Example, copy_model, deployed_copy, quiet
from slabformer.surgery.fuse.tree.fold import commit
from slabformer.surgery.fuse.tree.norms import Norm, find_norms
from slabformer.surgery.fuse.tree.plan import Edit, Plan
from slabformer.surgery.fuse.tree.values import Solution
from slabformer.surgery.outputs import Plain, first_line, leaves, why_not_comparable
from slabformer.surgery.reasons import Reason, Why

logger = logging.getLogger(__name__)

#: largest difference over the RMS of an output. Copies run in float64, where only float32 islands inside a forward
#: leave more than 1e-12; the others are for models that cannot run in float64 (kernels, devices, memory)
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: share of integer outputs that may differ where a model cannot run in float64: logits may be equal to rounding
MOST_INTEGERS = 1e-3
#: round floats to floats, so that a small change is lost or becomes a large one
_STEPS = {"round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside"}
#: integers, booleans or numbers that do not depend on a float's value, or that only these operators read again
_WITHOUT_DECISION = ("new_", "_like", "max_pool", "scaled_dot_product", "sym_", "is_same_size")


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

    def _is_blind(self) -> bool:
        """Whether an output is 0 throughout, as behind a head that starts at 0, so that no fold could change it."""
        tensors = [tensor for each in self.reference for tensor in each.tensors().values() if tensor.numel()]
        return any(tensor.is_floating_point() and not tensor.any() for tensor in tensors)

    def _seeing(self) -> Trial | None:
        """The same of a copy whose parameters that are 0 throughout are drawn; None if that shows no more."""
        copied = copy_model(self.model, lambda tensor: tensor)
        _draw_zeros_(copied)
        try:
            trial = Trial(copied, find_norms(copied), self.examples)
        except ValueError:  # drawn values may overflow
            return None
        return None if trial._is_blind() else trial

    def _run_reference(self, examples: Sequence[Example], dtype: torch.dtype | None) -> None:
        self.reference = _observe(deployed_copy(self.model, dtype), examples)
        self.examples, self.dtype = examples, dtype

    def settle(self, plan: Plan) -> Solution:
        """The plan without the folds that change the outputs; ``plan`` is amended with reasons.

        Also where an output is 0 throughout, as behind a head that starts at 0: parameters that are 0 are drawn then.
        """
        self._settle(plan)
        seeing = self._seeing() if self._is_blind() else None
        if seeing is not None:
            seeing._settle(plan)
        return Solution(self.model, self.norms, plan.edits)

    def _settle(self, plan: Plan) -> None:
        if not self.holds(plan):
            if not plan.edits or not self._holds([], plan.untouchable):
                self._settle_affines(plan)
            plan.edits = self._settle_edits([], plan.edits, plan)

    def holds(self, plan: Plan) -> bool:
        """Whether a plan leaves the outputs as they are."""
        return self._holds(plan.edits, plan.untouchable)

    def before_and_after(self, solution: Solution, plan: Plan) -> tuple[nn.Module, nn.Module]:
        """Two copies that run on ``examples``, one of them fused."""
        before, after = deployed_copy(self.model, self.dtype), deployed_copy(self.model, self.dtype)
        commit(after, solution, plan.untouchable)
        return before, after

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
                words = "left as it is, the output changes when an Affine stands for it"
                plan.reasons[norm.index] = Why.of(Reason.AFFINE_CHANGES_OUTPUT, words)
        plan.edits = [edit for edit in plan.edits if edit.norm not in plan.untouchable]

    def _holds(self, edits: Sequence[Edit], untouchable: set[int]) -> bool:
        solution = Solution(self.model, self.norms, edits)
        if solution.overflows():
            return False
        candidate = deployed_copy(self.model, self.dtype)
        commit(candidate, solution, untouchable)
        try:
            observations = _observe(candidate, self.examples)
        except Exception as error:
            logger.debug("the fused model fails: %s", first_line(error))
            return False
        integers = 0.0 if self.dtype is torch.float64 else MOST_INTEGERS
        return all(is_same(one, other, integers) for one, other in zip(self.reference, observations, strict=True))


def is_refuted_by(model: nn.Module, norms: Sequence[Norm], examples: Sequence[Example], plan: Plan) -> bool:
    """Whether ``plan`` changes what is asked for on ``examples``, which have another image size.

    A graph does not show what a forward does at other sizes only, such as ``if pad > 0: pad``.
    """
    try:
        trial = Trial(model, norms, examples)
    except ValueError:  # a model for one size
        return False
    return not trial.holds(plan)


@torch.no_grad()
def _draw_zeros_(model: nn.Module) -> None:
    """Draw what is 0 throughout in a copy that shares its tensors."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.data = (torch.randn(parameter.shape, generator=generator) * fan_in**-0.5).to(parameter)


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


def _why(edit: Edit) -> Why:
    names = ", ".join(target.name for target in edit.targets)
    unread = any(target.new_bias for target in edit.targets)
    hint = (
        "the forward does not take the bias that this needs" if unread else "too large for its dtype, or read elsewhere"
    )
    words = f"folding it {edit.action} into {names} changes the output: {hint}"
    return Why.of(Reason.OUTPUT_CHANGES, words)


# --- what a model computes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """What a model computed on one example.

    Attributes:
        outputs: Tensors and texts by their place in what it returned.
        decisions: The floats that integers, booleans and numbers were made of, in order: the logits in front of an
            argmax, for example, whose labels stay the same though a wrong fold moves them.
    """

    outputs: Mapping[str, Tensor | Plain]
    decisions: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """The outputs that are tensors."""
        return {place: leaf for place, leaf in self.outputs.items() if isinstance(leaf, Tensor)}


def observe(model: nn.Module, example: Example) -> Observation:
    """What ``model`` computes on ``example``; the same random numbers at every call, the global state untouched."""
    devices = {tensor.device for tensor in example.tensors() if tensor.is_cuda}
    watch = _Decisions()
    with alone, quiet(), torch.random.fork_rng(devices), watch:
        torch.manual_seed(0)
        output = example.outputs_of(model)
    outputs = {place: leaf.clone() if isinstance(leaf, Tensor) else leaf for place, leaf in leaves(output).items()}
    return Observation(outputs, watch.found)


class _Decisions(DispatchMode):
    """Keeps the floats from which an operator makes what is no float."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if _decides(func, output):
            given = tree_leaves((args, kwargs))
            self.found += [leaf.clone() for leaf in given if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return output


def _decides(func: Any, output: Any) -> bool:
    name = func.__name__.partition(".")[0]
    if any(part in name for part in _WITHOUT_DECISION):
        return False
    made = tree_leaves(output)
    is_value = any(
        not leaf.is_floating_point() and not leaf.is_complex()
        if isinstance(leaf, Tensor)
        else isinstance(leaf, (bool, int, float))
        for leaf in made
    )
    return is_value or name in _STEPS
