"""What losing each norm would cost, before anybody trains anything, and which ones to take."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._defaults import AUDIT_BATCHES
from slabformer.nn.controls import prepbn_modules
from slabformer.nn.norms import norm_type
from slabformer.settings import PositiveFraction, PositiveInt, checked
from slabformer.surgery.batches import eval_mode
from slabformer.surgery.conversion_plan import ConversionPlan
from slabformer.surgery.convert import find_layer_norms, nothing_to_convert, replace_norms_
from slabformer.surgery.fit import fit_norms_
from slabformer.surgery.regression import PairSums, TokenSums
from slabformer.surgery.study import Outputs, Study, pick, plan_within, valid

logger = logging.getLogger(__name__)

#: share of tokens and of channels in which errors are called concentrated
_FEW = 0.01
#: tokens or channels hold "most" of the error from here on
_MOST = 0.5


@dataclass(frozen=True, kw_only=True)
class NormCost:
    """How well one line per channel could stand in for a norm.

    Attributes:
        name: Of the module; the first of its names where it is tied.
        r2: Share of its output's variance that the best line per channel explains.
        tokens: Of what that leaves, the share in the hundredth of the tokens where it is largest.
        first_token: The same in the first token of each sequence, often a class token; 0 where there are no sequences.
        channels: The same in the hundredth of the channels where it is largest.
        alone: What losing this norm alone takes from the cosine of the model's outputs, untrained.
    """

    name: str
    r2: float
    tokens: float
    first_token: float
    channels: float
    alone: float

    def where(self) -> str:
        """Where most of the error is, in words."""
        if self.first_token > _MOST:
            return "the first token"
        if self.channels > _MOST:
            return "few channels"
        return "few tokens" if self.tokens > _MOST else "everywhere"


@checked
def norm_costs(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_batches: PositiveInt | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    outputs: Outputs | None = None,
    budget: PositiveFraction | None = None,
) -> tuple[tuple[NormCost, ...], ConversionPlan]:
    """What losing each norm would cost, and which ones to take; nothing is changed.

    Time: two forwards of the batches, one for each norm, and with a budget up to ``2 log2(norms)`` for the search.

    Args:
        model: With its own norms, trained; in any mode.
        batches: As for :func:`slabformer.recalibrate_`; padding is left out by ``attention_mask``.
        num_batches: Stop after so many; 8 by default.
        forward: As for :func:`slabformer.recalibrate_`.
        outputs: ``outputs(model, batch)`` returns the tensors ``(*, C)`` whose cosine counts, an embedding for example;
            by default those that the forward returns, each token for itself.
        budget: What the norms that are taken may cost together; None takes those that cost at most 0.1 each.

    Returns:
        A cost for each norm in the model's order, and a plan.

    Raises:
        ValueError: If the model has no norm to convert or some are converted already, there is no batch, an activation
            is not finite, there is no output to compare, or no norm can go within the budget.
    """
    if [norm for norm in prepbn_modules(model).values() if norm.phase != "done"]:
        raise ValueError("norms are converted already; audit with data before convert_norms_")
    found, left = find_layer_norms(model)
    if not found:
        raise ValueError(nothing_to_convert(model, 0, left))
    study = _NormStudy(model, [*found], {name: form.channel_dim for name, form in found.items()}, forward, outputs)
    study.read(itertools.islice(batches, num_batches or AUDIT_BATCHES))
    costs = study.costs()
    return costs, study.plan(costs, budget)


class _NormStudy(Study):
    """A model on some batches, as it is and with norms replaced by lines.

    Args:
        model: With its own norms.
        names: Of the norms; tied ones under each name.
        axes: Of their channels.
        forward: Of the caller.
        outputs: Of the caller.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        axes: Mapping[str, int],
        forward: Callable[[nn.Module, Any], Any] | None,
        outputs: Outputs | None,
    ) -> None:
        super().__init__(model, forward, outputs)
        self.names, self.axes = names, axes
        #: first name of each norm, by the norm
        self.norms: dict[nn.Module, str] = {}
        for name in names:
            self.norms.setdefault(model.get_submodule(name), name)

    def costs(self) -> tuple[NormCost, ...]:
        """Of every norm that sees a token."""
        sums: dict[str, TokenSums] = {}

        def take_in(name: str, x: Tensor, y: Tensor, first: Tensor) -> None:
            sums.setdefault(name, TokenSums(x.shape[-1], x.device)).add(x, y)

        self._watch(take_in)
        errors = {name: _Errors(seen.alike) for name, seen in sums.items()}
        self._watch(lambda name, x, y, first: errors[name].add(x, y, first))
        unseen = [name for name in self.norms.values() if name not in sums]
        if unseen:
            logger.warning("%d norms see no token (first: %s) and are kept", len(unseen), unseen[0])
        return tuple(
            NormCost(name=name, alone=self._alone(name, sums[name].relative), **errors[name].shares())
            for name in self.norms.values()
            if name in sums
        )

    @torch.no_grad()
    def _watch(self, see: Callable[[str, Tensor, Tensor, Tensor], None]) -> None:
        """Run all batches; ``see`` is told each norm's name, inputs and outputs ``(N, C)``, and which are first tokens.

        Raises:
            ValueError: If one is not finite.
        """
        current = 0

        def hook_of(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                x, y = (t.movedim(self.axes[name], -1) for t in (_input_of(args, kwargs), output))
                if not (x.isfinite().all() and y.isfinite().all()):
                    raise ValueError(
                        f"inputs or outputs of {name} are not finite in batch {current + 1}; check the data and the "
                        "weights"
                    )
                first = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
                if x.ndim == 3:
                    first[:, 0] = True
                keep = valid(x, self.batches[current])
                see(name, pick(x, keep), pick(y, keep), pick(first.unsqueeze(-1), keep).squeeze(-1))

            return hook

        handles = [norm.register_forward_hook(hook_of(name), with_kwargs=True) for norm, name in self.norms.items()]
        try:
            with eval_mode(self.model):
                for current, batch in enumerate(self.batches):  # noqa: B007 - the hooks read it
                    self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _alone(self, name: str, sums: PairSums) -> float:
        """What the outputs lose if this norm alone is its best line."""
        norm, axis = next(norm for norm, own in self.norms.items() if own == name), self.axes[name]
        slope, offset = _line(sums)

        def line(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = _input_of(args, kwargs).movedim(axis, -1)
            return torch.addcmul(offset.to(x), x, slope.to(x)).movedim(-1, axis).to(output.dtype)

        handle = norm.register_forward_hook(line, with_kwargs=True)
        try:
            return self.distance(self.model)
        finally:
            handle.remove()

    def plan(self, costs: Sequence[NormCost], budget: float | None) -> ConversionPlan:
        """Which norms to take: the cheapest, as many as ``budget`` allows.

        Raises:
            ValueError: If not even the cheapest can go.
        """
        alone = {cost.name: cost.alone for cost in sorted(costs, key=lambda cost: cost.alone)}
        return plan_within(alone, budget, lambda names: self._tried(names, budget), "norms")

    @torch.no_grad()
    def _tried(self, names: Collection[str], budget: float | None) -> ConversionPlan:
        """The plan that takes ``names``, and what it costs: they are fitted one after the other, on a copy."""
        tied = {name for name in self.names if self.norms[self.model.get_submodule(name)] in set(names)}
        copied = self.copied()
        forms = {name: form for name, form in find_layer_norms(copied)[0].items() if name in tied}
        replace_norms_(copied, forms, norm=norm_type("prepbn"))
        fit_norms_(copied, self.batches, forward=self.forward)
        return ConversionPlan.of_names(tied, self.names, self.distance(copied), budget)


class _Errors:
    """What the best line of a norm leaves unexplained, by channel and by token."""

    def __init__(self, sums: PairSums) -> None:
        self._slope, self._offset = _line(sums)
        self._variance = sums.products[2].sum()
        self._by_channel = torch.zeros_like(self._slope)
        self._by_token: list[Tensor] = []
        self._first = torch.zeros_like(self._variance)

    def add(self, x: Tensor, y: Tensor, first: Tensor) -> None:
        """Take in tokens ``(N, C)``, and which of them are the first of a sequence."""
        squares = (y.to(self._slope) - torch.addcmul(self._offset, x.to(self._slope), self._slope)).square()
        by_token = squares.sum(-1)
        self._by_channel += squares.sum(0)
        self._by_token.append(by_token)
        self._first += by_token[first.to(by_token.device)].sum()

    def shares(self) -> dict[str, float]:
        """R2, and where the rest is."""
        total = self._by_channel.sum().clamp(min=torch.finfo(torch.float64).tiny)
        largest = {
            "tokens": torch.cat(self._by_token),
            "channels": self._by_channel,
        }
        shares = {
            name: float(values.topk(max(1, round(_FEW * len(values)))).values.sum() / total)
            for name, values in largest.items()
        }
        r2 = 1 - float(total / self._variance) if self._variance > 0 else 1.0
        return {"r2": r2, "first_token": float(self._first / total), **shares}


def _line(sums: PairSums) -> tuple[Tensor, Tensor]:
    """Slope and offset of the best line per channel, float64."""
    varies = sums.products[0] > 0
    slope = torch.where(varies, sums.products[1] / sums.products[0].where(varies, 1), 0)
    return slope, sums.mean[1] - slope * sums.mean[0]


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
