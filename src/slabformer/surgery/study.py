"""A trained model on some batches, as it is and with parts replaced, and the search for those that a budget allows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.ops.precision import wide
from slabformer.surgery.batches import NO_BATCH, call_model, eval_mode, model_device, to_device
from slabformer.surgery.conversion_plan import SINGULAR, ConversionPlan, Of
from slabformer.surgery.outputs import first_line, tensors_by_place

#: without a budget a part is kept if losing it alone takes more than this from the outputs' cosine
WORTH = 0.1

Outputs = Callable[[nn.Module, Any], Any]


class Study:
    """A model on some batches, and how far a changed one is from it.

    Args:
        model: As it was trained.
        forward: Of the caller, as for :func:`slabformer.recalibrate_`.
        outputs: ``outputs(model, batch)`` returns the tensors whose cosine counts; by default what the forward returns.

    Attributes:
        batches: On the model's device.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None, outputs: Outputs | None
    ) -> None:
        self.model = model
        self.forward = forward or call_model
        self.outputs = outputs or self.forward
        self.batches: list[Any] = []
        self._references: list[list[Tensor]] = []

    @torch.no_grad()
    def read(self, batches: Iterable[Any]) -> None:
        """Keep the batches and what the model makes of them.

        Raises:
            ValueError: If there is none, or an output cannot be compared.
        """
        device = model_device(self.model)
        with eval_mode(self.model):
            for batch in batches:
                self.batches.append(to_device(batch, device))
                self._references.append(self._compared(self.model, len(self.batches) - 1))
        if not self.batches:
            raise ValueError(NO_BATCH)

    def _compared(self, model: nn.Module, index: int) -> list[Tensor]:
        """Outputs whose cosine counts, as rows ``(N, C)`` each, padding left out."""
        batch = self.batches[index]
        found = tensors_by_place(self.outputs(model, batch)).values()
        rows = [
            pick(tensor, valid(tensor, batch)) for tensor in found if tensor.is_floating_point() and tensor.ndim > 1
        ]
        if not rows:
            raise ValueError("no output (*, C) to compare; pass outputs=lambda model, batch: ...")
        return rows

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """One minus the mean cosine between what ``model`` returns now, in eval mode, and what the given one does."""
        total, count = 0.0, 0
        with eval_mode(model):
            for index, references in enumerate(self._references):
                for actual, reference in zip(self._compared(model, index), references, strict=True):
                    cosine = nn.functional.cosine_similarity(wide(actual), wide(reference), dim=-1)
                    total += float(cosine.nan_to_num(0.0).sum())
                    count += len(cosine)
        return 1 - total / count

    def copied(self) -> nn.Module:
        """A copy of the model, to try a plan on.

        Raises:
            ValueError: If it cannot be copied.
        """
        try:
            return copy.deepcopy(self.model)
        except Exception as error:
            raise ValueError(
                f"a plan is tried on a copy, and the model cannot be copied ({first_line(error)})"
            ) from error


def plan_within(
    alone: Mapping[str, float], budget: float | None, tried: Callable[[Sequence[str]], ConversionPlan], of: Of
) -> ConversionPlan:
    """What to convert: as many as ``budget`` allows, from the front.

    Args:
        alone: What losing each one alone costs, in the order in which they are taken.
        budget: For all that are taken; None takes those that cost at most 0.1 each.
        tried: The plan that takes some of them, with what it costs.
        of: What they are.

    Raises:
        ValueError: If not even the first can go.
    """
    order = list(alone)
    if budget is None:
        return tried([name for name in order if alone[name] <= WORTH] or order[:1])
    best: ConversionPlan | None = None
    low, high = 0, len(order)  # the first `low` are known to fit
    while low < high:
        middle = -(-(low + high) // 2)
        plan = tried(order[:middle])
        if plan.cost <= budget:
            best, low = plan, middle
        else:
            high = middle - 1
    if best is None:
        raise ValueError(
            f"no {SINGULAR[of]} can go within a budget of {budget:.3g}: losing {order[0]} alone, the cheapest, costs "
            f"{alone[order[0]]:.3g}; raise it, or train (distil) and look again"
        )
    return best


def valid(tokens: Tensor, batch: Any) -> Tensor | None:
    """Which of ``tokens`` ``(B, N, C)`` the batch's ``attention_mask`` ``(B, N)`` lets through; None for all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:-1]:
        return None
    return mask.bool().to(tokens.device)


def pick(tokens: Tensor, keep: Tensor | None) -> Tensor:
    """Tokens ``(*, C)`` as ``(N, C)``, those to keep."""
    return tokens.flatten(0, -2) if keep is None else tokens[keep]
