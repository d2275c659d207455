"""What a conversion returns: the names of what it converted, and what it left, with reasons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self

from torch import nn

from slabformer.surgery.reasons import Reason, Why


class LeftModule(NamedTuple):
    """A module that looks like what is converted, a norm or an attention, and was left as it is.

    Attributes:
        name: Of the module.
        kind: Name of its class.
        reason: Why it was left, as a clause.
        code: Of the reason.
    """

    name: str
    kind: str
    reason: str
    code: Reason

    @classmethod
    def of(cls, name: str, module: nn.Module, why: Why) -> Self:
        """``module`` was left because of ``why``."""
        return cls(name, type(module).__name__, why.words, why.codes[0])

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}) left as it is: {self.reason}"


class ConvertedModules(list[str]):
    """Names of the converted modules, in the model's order; a tied one stands under each of its names.

    Attributes:
        left: What looks like one and was left, but for what the filter refused.
    """

    def __init__(self, names: Iterable[str] = (), left: Iterable[LeftModule] = ()) -> None:
        super().__init__(names)
        self.left = tuple(left)


def summary_of(left: Iterable[LeftModule]) -> list[str]:
    """One line for each class and reason: the first such module, and how many more there are."""
    groups: dict[tuple[str, str], list[LeftModule]] = {}
    for module in left:
        groups.setdefault((module.kind, module.reason), []).append(module)
    return [str(first) + (f" (and {len(more)} more like it)" if more else "") for first, *more in groups.values()]
