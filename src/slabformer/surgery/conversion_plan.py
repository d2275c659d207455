"""Which norms, or which attentions, of a model to convert and which to leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Of = Literal["norms", "attentions"]
#: one of them
SINGULAR: dict[Of, str] = {"norms": "norm", "attentions": "attention"}
#: what takes a plan of them
TAKER: dict[Of, str] = {"norms": "convert_norms_", "attentions": "convert_attention_"}


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Which norms to convert and which to leave: what :func:`slabformer.convert_norms_` takes as ``plan``.

    Or which attentions, for :func:`slabformer.convert_attention_`.

    Attributes:
        take: Names of those to convert; a tied one stands under each of its names.
        keep: Names of those that stay.
        cost: What the start alone, before training, takes from the cosine of the model's outputs.
        budget: What it was allowed to take; None if none was given.
        of: "norms" or "attentions".
    """

    take: tuple[str, ...]
    keep: tuple[str, ...]
    cost: float
    budget: float | None = None
    of: Of = "norms"

    @classmethod
    def of_names(
        cls, taken: Collection[str], names: Collection[str], cost: float, budget: float | None, of: Of = "norms"
    ) -> ConversionPlan:
        """Take those of ``names`` that are ``taken``, in their order, and keep the others."""
        take, keep = (tuple(name for name in names if (name in taken) == wanted) for wanted in (True, False))
        return cls(take=take, keep=keep, cost=cost, budget=budget, of=of)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ConversionPlan:
        """Back from :meth:`to_dict`.

        Raises:
            ValueError: If it is something else.
        """
        if not isinstance(data, Mapping) or not {"take", "keep", "cost"} <= data.keys():
            raise ValueError("not a conversion plan: it needs take, keep and cost, as `slab audit --plan` writes them")
        names = {key: data[key] for key in ("take", "keep")}
        if not all(
            isinstance(value, (list, tuple)) and all(isinstance(n, str) for n in value) for value in names.values()
        ):
            raise ValueError("not a conversion plan: take and keep must be lists of names")
        of = data.get("of", "norms")
        if of not in get_args(Of):
            raise ValueError(f"not a conversion plan: it must be of {' or '.join(get_args(Of))}, got {of!r}")
        take, keep = (tuple(value) for value in names.values())
        return cls(take=take, keep=keep, cost=data["cost"], budget=data.get("budget"), of=of)

    def summary(self) -> str:
        """One line."""
        allowed = "" if self.budget is None else f" of {self.budget:.3g} allowed"
        return (
            f"plan: convert {len(self.take)} of {len(self.take) + len(self.keep)} {self.of}; before training this "
            f"takes {self.cost:.3g}{allowed} from the outputs' cosine"
        )


def names_to_take(plan: ConversionPlan | Collection[str], known: Collection[str], of: Of = "norms") -> set[str]:
    """What ``plan`` takes, of the model's ``known`` norms or attentions.

    Raises:
        ValueError: If it names others, or none, is of something else, or is one name instead of a collection.
    """
    if isinstance(plan, str):
        raise ValueError(f"a plan is a collection of names, got the string {plan!r}; pass [{plan!r}]")
    if isinstance(plan, ConversionPlan) and plan.of != of:
        raise ValueError(f"the plan is of {plan.of}: give it to {TAKER[plan.of]}")
    take, keep = (plan.take, plan.keep) if isinstance(plan, ConversionPlan) else (tuple(plan), ())
    unknown = [name for name in (*take, *keep) if name not in known]
    if unknown:
        counted = f"1 {SINGULAR[of]}" if len(unknown) == 1 else f"{len(unknown)} {of}"
        raise ValueError(
            f"the plan names {counted} that the model does not have or that cannot be converted (first: {unknown[0]!r})"
        )
    if not take:
        raise ValueError(f"the plan takes no {SINGULAR[of]}")
    return set(take)
