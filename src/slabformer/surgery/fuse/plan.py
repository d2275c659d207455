"""What a decision consists of: edits, their targets, and reasons."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from slabformer.surgery.fuse.parts import Part
from slabformer.surgery.fuse.report import Action


@dataclass(frozen=True)
class Target:
    """What one neighbour takes over.

    Attributes:
        name: Of the neighbour, for the report.
        index: Channel of the norm that each channel of the neighbour belongs to, -1 for none.
        weight: Its weight; None if the neighbour is a norm or a pad.
        bias: Its bias.
        new_bias: Whether that bias must be created.
        groups: Of a Conv.
        norm: Index of the norm that takes it over instead, or None.
        pad: Index of the pad whose fill changes, or None.
    """

    name: str
    index: Tensor
    weight: Part | None = None
    bias: tuple[Part, ...] = ()
    new_bias: bool = False
    groups: int = 1
    norm: int | None = None
    pad: int | None = None

    def agrees(self, other: Target) -> bool:
        """Whether both are one and the same change."""
        mine, others = ([part for part in (own.weight, *own.bias) if part is not None] for own in (self, other))
        return (
            (self.groups, len(mine)) == (other.groups, len(others))
            and all(one.agrees(two) for one, two in zip(mine, others, strict=True))
            and torch.equal(self.index, other.index)
        )


@dataclass(frozen=True)
class Edit:
    """One norm's way into its neighbours."""

    norm: int
    action: Action
    targets: tuple[Target, ...]


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        edits: In the order in which they must be made.
        reasons: Why each other norm is kept.
        untouchable: Norms that cannot even become an Affine.
    """

    edits: list[Edit] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    untouchable: set[int] = field(default_factory=set)
