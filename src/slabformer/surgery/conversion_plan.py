"""Which norms of a model to convert and which to leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Which norms to convert and which to leave: what :func:`slabformer.convert_norms_` takes as ``plan``.

    Attributes:
        take: Names of the norms to convert; a tied one stands under each of its names.
        keep: Names of those that stay.
        cost: What the start alone, before training, takes from the cosine of the model's outputs.
        budget: What it was allowed to take; None if none was given.
    """

    take: tuple[str, ...]
    keep: tuple[str, ...]
    cost: float
    budget: float | None = None

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
        return cls(take=tuple(data["take"]), keep=tuple(data["keep"]), cost=data["cost"], budget=data.get("budget"))

    def summary(self) -> str:
        """One line."""
        allowed = "" if self.budget is None else f" of {self.budget:.3g} allowed"
        return (
            f"plan: convert {len(self.take)} of {len(self.take) + len(self.keep)} norms; before training this takes "
            f"{self.cost:.3g}{allowed} from the outputs' cosine"
        )


def names_to_take(plan: ConversionPlan | Collection[str], known: Collection[str]) -> set[str]:
    """The norms that ``plan`` takes, of the model's ``known`` ones.

    Raises:
        ValueError: If it names others, or none.
    """
    take, keep = (plan.take, plan.keep) if isinstance(plan, ConversionPlan) else (tuple(plan), ())
    unknown = [name for name in (*take, *keep) if name not in known]
    if unknown:
        raise ValueError(f"the plan names {len(unknown)} norms that the model does not have (first: {unknown[0]!r})")
    if not take:
        raise ValueError("the plan takes no norm")
    return set(take)
