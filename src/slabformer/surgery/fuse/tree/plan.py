"""What a decision consists of: edits, their targets, and reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slabformer.surgery.fuse.report import Action, NormOutcome
from slabformer.surgery.fuse.tree.norms import Norm

#: what a neighbour takes over of ``x * scale + shift``: all of it, ``x * scale``, ``x + shift / scale``, or the inverse
#: of that
Role = Literal["map", "scale", "add", "subtract"]
#: where it stands: behind the norm, in whose input it has the map, or in front, in whose output it has it
Side = Literal["next", "previous"]


def share(role: Role, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What ``role`` takes over of a map, as a scale and shift of its own."""
    if role == "map":
        return scale, shift
    if role == "scale":
        return scale, torch.zeros_like(shift)
    move = torch.where(shift == 0, shift, shift / scale)
    return torch.ones_like(scale), move if role == "add" else -move


@dataclass(frozen=True)
class Part:
    """Elements of one parameter or buffer that serve as the weight or bias of some output channels.

    Attributes:
        name: Of the parameter; the first of its names where it is tied.
        axis: Its axis that counts output channels.
        rows: Which elements along it.
        channels: The output channel that each of them serves.
        groups: Of a transposed convolution, whose weight ``(in, out / groups, *kernel)`` holds them group by group.
    """

    name: str
    axis: int
    rows: Tensor
    channels: Tensor
    groups: int = 1

    def agrees(self, other: Part) -> bool:
        """Whether both are the same elements for the same channels."""
        mine, others = (self.name, self.axis), (other.name, other.axis)
        return mine == others and torch.equal(self.rows, other.rows) and torch.equal(self.channels, other.channels)

    def opened(self, stored: Tensor) -> Tensor:
        """The whole parameter with its output channels first, ``(out, in / groups, *kernel)``."""
        if self.groups == 1:
            return stored.movedim(self.axis, 0)
        return stored.unflatten(0, (self.groups, -1)).movedim(2, 1).flatten(0, 1)

    def closed(self, opened: Tensor) -> Tensor:
        """Back from :meth:`opened`."""
        if self.groups == 1:
            return opened.movedim(0, self.axis)
        return opened.unflatten(0, (self.groups, -1)).movedim(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Target:
    """What one neighbour takes over.

    Attributes:
        name: Of the neighbour, for the report.
        role: What it takes over of the norm's map.
        side: Where it stands.
        index: Channel of the norm that each channel of the neighbour belongs to, -1 for none.
        weight: Its weight; None if the neighbour is no Linear or Conv.
        bias: Its bias.
        new_bias: Whether that bias must be created.
        groups: Of a Conv.
        gain: What its output is multiplied by before it meets the stream (LayerScale), if anything.
        values: Elements that are what the norm's channels are made of: of an embedding's table, of a position table.
        factor: What the shift is multiplied by here: the number that stands between the neighbour and the norm behind
            which it stands, or one over that where it stands in front.
        norm: Index of the norm that takes it over instead, or None.
        pad: Index of the pad whose fill changes, or None.
    """

    name: str
    role: Role
    side: Side
    index: Tensor
    weight: Part | None = None
    bias: tuple[Part, ...] = ()
    new_bias: bool = False
    groups: int = 1
    gain: Part | None = None
    values: Part | None = None
    factor: float = 1.0
    norm: int | None = None
    pad: int | None = None

    def agrees(self, other: Target) -> bool:
        """Whether both are one and the same change."""
        mine, others = (
            [part for part in (own.weight, own.gain, own.values, *own.bias) if part is not None]
            for own in (self, other)
        )
        return (
            (self.groups, self.role, self.side, self.factor) == (other.groups, other.role, other.side, other.factor)
            and len(mine) == len(others)
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
        tied: Parameters that stood in the way because several modules hold them.
        shared: Those that did because their module has several names and is called on several inputs.
    """

    edits: list[Edit] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    untouchable: set[int] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)


def outcomes(norms: Iterable[Norm], plan: Plan) -> tuple[NormOutcome, ...]:
    """What a plan does with every norm."""
    folded = {edit.norm: edit for edit in plan.edits}
    found = []
    for norm in norms:
        edit = folded.get(norm.index)
        if edit is None:
            found.append(NormOutcome(norm.name, "kept", reason=plan.reasons[norm.index]))
        else:
            into = dict.fromkeys(target.name for target in edit.targets)
            found.append(NormOutcome(norm.name, edit.action, tuple(into)))
    return tuple(found)
