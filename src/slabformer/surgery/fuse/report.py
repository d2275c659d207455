"""What became of every norm, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from slabformer.surgery.converted import LeftModule
from slabformer.surgery.reasons import Reason

Action = Literal["forward", "backward", "kept"]


@dataclass(frozen=True)
class NormOutcome:
    """Where one norm went.

    Attributes:
        name: Of the module; the first of its names where it is tied.
        action: "forward" into what follows, "backward" into what precedes, or "kept".
        into: Names of the modules and parameters that took it over; empty when kept.
        reason: Why it was kept, in words; empty otherwise.
        codes: The same for programs: of each reason in the words, the one against folding forward first.
    """

    name: str
    action: Action
    into: tuple[str, ...] = ()
    reason: str = ""
    codes: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        if self.action == "kept":
            return f"{self.name} kept as Affine: {self.in_words()}"
        return f"{self.name} folded {self.action} into {', '.join(self.into)}"

    def in_words(self) -> str:
        """What took it over, or why it was kept and the codes of that."""
        return ", ".join(self.into) or f"{self.reason} [{', '.join(self.codes)}]"


@dataclass(frozen=True)
class FuseReport:
    """All outcomes of a fusion, in the model's order; iterable.

    Attributes:
        outcomes: One per norm.
        input_shapes: Shapes of the tensors of each example input that the model was traced on; the folds hold for them.
        left: Not among the outcomes: norms that are no scale and shift per channel in eval mode, such as LayerNorm and
            DyT; in an audit, what looks like a norm and cannot be converted.
        changed_methods: Names of the model's usual methods and outputs beside its forward that compute something else
            now, such as "forward_features", "hidden_states" or "reset_classifier" (the features that a new head reads).
    """

    outcomes: tuple[NormOutcome, ...]
    input_shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    left: tuple[LeftModule, ...] = ()
    changed_methods: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[NormOutcome]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def __getitem__(self, name: str) -> NormOutcome:
        """Outcome of the norm called ``name``."""
        return {outcome.name: outcome for outcome in self.outcomes}[name]

    @property
    def num_folded(self) -> int:
        """Norms that are gone."""
        return len(self) - self.num_kept

    @property
    def num_kept(self) -> int:
        """Norms that are still computed, as one multiply-add."""
        return sum(outcome.action == "kept" for outcome in self)

    def summary(self) -> str:
        """One line: how many went where, the input shapes it holds for, and which methods it does not hold for."""
        count = Counter(outcome.action for outcome in self)
        shapes = "; ".join(", ".join(map(str, example)) for example in self.input_shapes)
        changed = f"; computed otherwise now: {', '.join(self.changed_methods)}" if self.changed_methods else ""
        left = f", {len(self.left)} that look like norms left as they are" if self.left else ""
        return (
            f"{self.num_folded} of {len(self)} norms folded ({count['forward']} forward, "
            f"{count['backward']} backward), {self.num_kept} kept{left}; traced on inputs of shape {shapes}{changed}"
        )

    def table(self) -> str:
        """One line a norm, aligned, and the summary."""
        width = max((len(norm.name) for norm in (*self, *self.left)), default=0)
        lines = [f"{o.name:<{width}}  {o.action:<8}  {o.in_words()}" for o in self]
        lines += [f"{norm.name:<{width}}  {'left':<8}  {norm.kind}: {norm.reason} [{norm.code}]" for norm in self.left]
        return "\n".join([*lines, self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "num_folded": self.num_folded,
            "num_kept": self.num_kept,
            "input_shapes": [[list(shape) for shape in example] for example in self.input_shapes],
            "changed_methods": list(self.changed_methods),
            "norms": [
                {**asdict(outcome), "into": list(outcome.into), "codes": [str(code) for code in outcome.codes]}
                for outcome in self
            ],
            "left": [{**norm._asdict(), "code": str(norm.code)} for norm in self.left],
        }
