"""What making each attention of a trained model linear would cost and save, and which ones to take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from slabformer._defaults import AUDIT_BATCHES
from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.nn.resample import Grid
from slabformer.settings import NonNegativeInt, PositiveFraction, PositiveInt, checked
from slabformer.surgery.align_attention import align_attention_
from slabformer.surgery.attention_start import Seen, captured, mean_errors, start_
from slabformer.surgery.batches import eval_mode
from slabformer.surgery.conversion_plan import ConversionPlan
from slabformer.surgery.convert_attention import (
    linear_form,
    no_attention,
    tokens_of,
)
from slabformer.surgery.converted import LeftModule
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.outputs import tensors_of
from slabformer.surgery.recognise_attention import AttentionForm, find_attentions
from slabformer.surgery.study import Outputs, Study, plan_within

#: batches that the closed-form start is taken from, as by default in :func:`slabformer.align_attention_`
FIT_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class AttentionCost:
    """What making one attention linear would cost and save.

    Attributes:
        name: Of the module.
        error: Squared error of its output after the closed-form start, over the variance of the softmax attention's.
        alone: What making this one alone linear takes from the cosine of the model's outputs, untrained.
        products: Multiply-adds of its two products with softmax, for one sample.
        saved: Of these, what linear attention with its depthwise branch does without; negative where it needs more.
    """

    name: str
    error: float
    alone: float
    products: int
    saved: int


@dataclass(frozen=True)
class AttentionAudit:
    """What :func:`audit_attention` found.

    Attributes:
        costs: One per attention that can be converted, in the model's order.
        plan: Which of them to convert.
        left: What looks like an attention and cannot be converted.
    """

    costs: tuple[AttentionCost, ...]
    plan: ConversionPlan
    left: tuple[LeftModule, ...] = ()

    def cost_table(self) -> str:
        """One line an attention, aligned, and what the plan comes to."""
        width = max(len(cost.name) for cost in self.costs)
        lines = [f"{'attention':<{width}}  {'error':>6}  {'alone':>8}  {'saved':>15}  plan"]
        for cost in self.costs:
            saved = f"{cost.saved / 1e6:,.1f} of {cost.products / 1e6:,.1f} M"
            choice = "keep" if cost.name in self.plan.keep else "convert"
            lines.append(f"{cost.name:<{width}}  {cost.error:6.3f}  {cost.alone:8.2g}  {saved:>15}  {choice}")
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The plan in two lines."""
        saved = sum(cost.saved for cost in self.costs if cost.name in self.plan.take)
        products = sum(cost.products for cost in self.costs)
        return (
            f"{self.plan.summary()}\nit saves {saved / 1e6:,.1f} of {products / 1e6:,.1f} million multiply-adds of "
            "attention's products for each sample"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "costs": [asdict(cost) for cost in self.costs],
            "plan": self.plan.to_dict(),
            "left": [left._asdict() for left in self.left],
        }


@makes_ordinary_tensors
@checked
def audit_attention(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_batches: PositiveInt | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    outputs: Outputs | None = None,
    budget: PositiveFraction | None = None,
    grid_size: tuple[PositiveInt, PositiveInt] | None = None,
    num_prefix_tokens: NonNegativeInt | None = None,
    kernel_size: PositiveInt = 5,
) -> AttentionAudit:
    """What making each softmax attention linear would cost and save, and which ones to take; nothing is changed.

        report = slabformer.audit_attention(model, loader, budget=0.05)
        slabformer.convert_attention_(model, plan=report.plan)

    Each attention is replaced alone, after the closed-form start of :func:`slabformer.align_attention_`, and outputs
    are compared. Operations are those at the size of ``batches``: what linear attention saves grows with the square of
    the number of tokens. Where there are few it saves nothing, and such attentions are never planned. The others are
    taken in the order of what they cost for each operation that they save.

    Time: a forward of the batches for each attention, and with a budget up to ``2 log2(attentions)`` for the search.

    Args:
        model: With its softmax attention, trained; in any mode.
        batches: As for :func:`slabformer.recalibrate_`, images of the size that the model is used at.
        num_batches: Stop after so many; 8 by default.
        forward: As for :func:`slabformer.recalibrate_`.
        outputs: As for :func:`slabformer.audit`.
        budget: What the attentions that are taken may cost together, before training; None takes those that cost at
            most 0.1 each.
        grid_size: As for :func:`slabformer.convert_attention_`.
        num_prefix_tokens: The same.
        kernel_size: The same.

    Raises:
        ValueError: If the model has no attention to convert, none can go within the budget, there is no batch, an
            activation is not finite, or the grid is not known.
    """
    found, left = find_attentions(model)
    if not found:
        raise ValueError(no_attention(model, left))
    places = {name: tokens_of(model, form, grid_size, num_prefix_tokens) for name, form in found.items()}
    study = _AttentionStudy(model, found, forward, outputs, places, kernel_size)
    study.read(itertools.islice(batches, num_batches or AUDIT_BATCHES))
    costs = tuple(study.cost(name) for name in found)
    return AttentionAudit(costs, study.plan(costs, budget), left)


class _AttentionStudy(Study):
    """A model on some batches, as it is and with attentions made linear.

    Args:
        model: With softmax attention.
        forms: Of the attentions, by name.
        forward: Of the caller.
        outputs: Of the caller.
        places: Grid of the patch tokens, and how many are in front of them, of each.
        kernel_size: Of the depthwise branch.
    """

    def __init__(
        self,
        model: nn.Module,
        forms: Mapping[str, AttentionForm],
        forward: Callable[[nn.Module, Any], Any] | None,
        outputs: Outputs | None,
        places: Mapping[str, tuple[Grid, int]],
        kernel_size: int,
    ) -> None:
        super().__init__(model, forward, outputs)
        self.forms, self.places, self.kernel_size = forms, places, kernel_size

    @torch.no_grad()
    def cost(self, name: str) -> AttentionCost:
        """Of one attention; memory: its inputs and heads on the batches of the start."""
        old = self.model.get_submodule(name)
        with eval_mode(self.model):  # the projections are its own, and their modes
            new = linear_form(old, self.forms[name], *self.places[name], self.kernel_size).eval()
            pairs = {name: (new, old)}
            seen = [captured(self.model, pairs, self.forward, batch) for batch in self.batches[:FIT_BATCHES]]
            start_(new, [each[name] for each in seen])
            try:
                self.model.set_submodule(name, new)
                alone = self.distance(self.model)
            finally:
                self.model.set_submodule(name, old)
            error = mean_errors(pairs, seen)[name]
        samples = len(tensors_of(self.batches[0])[0])
        products, saved = (count // samples for count in _operations(new, seen[0][name]))
        return AttentionCost(name=name, error=error, alone=alone, products=products, saved=saved)

    def plan(self, costs: Collection[AttentionCost], budget: float | None) -> ConversionPlan:
        """Which attentions to take; none where none saves anything.

        Raises:
            ValueError: If not even the first of them can go within the budget.
        """
        worth = [cost for cost in costs if cost.saved > 0]
        if not worth:
            return ConversionPlan.of_names((), self.forms, 0.0, budget, of="attentions")
        alone = {cost.name: cost.alone for cost in sorted(worth, key=lambda cost: cost.alone / cost.saved)}
        return plan_within(alone, budget, lambda names: self._tried(names, budget), "attentions")

    @torch.no_grad()
    def _tried(self, names: Collection[str], budget: float | None) -> ConversionPlan:
        """The plan that takes ``names``, and what it costs: they are started together, on a copy."""
        copied = self.copied()
        for name in names:
            grid, prefix = self.places[name]
            copied.set_submodule(
                name, linear_form(copied.get_submodule(name), self.forms[name], grid, prefix, self.kernel_size)
            )
        align_attention_(copied, self.model, self.batches, fit_batches=FIT_BATCHES, steps=0, forward=self.forward)
        return ConversionPlan.of_names(names, self.forms, self.distance(copied), budget, of="attentions")


def _operations(linear: ConvertedLinearAttention, seen: Seen) -> tuple[int, int]:
    """Multiply-adds of both products with softmax, and what the linear form saves, on all that was ``seen``."""
    B, N, _ = seen.x.shape  # windows count as samples do
    C, D, K = linear.dim, linear.dim // linear.num_heads, linear.dwc.kernel_size[0]
    products, prefix = 2 * N * N * C, linear.num_prefix_tokens
    exact = prefix if linear.prefix_attention == "softmax" else 0
    ours = min(2 * N * D * C + 2 * exact * N * C, products) + (N - prefix) * K * K * C
    return B * products, B * (products - ours)
