"""What a decision consists of: which neighbour takes over what of which norm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slabformer.surgery.fuse.consumers import Consumer, Side
from slabformer.surgery.fuse.report import Action, NormOutcome
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.reasons import Why

#: what a neighbour takes over of ``x * scale + shift``
Role = Literal[
    "map",  # all of it
    "scale",  # ``x * scale``
    "add",  # ``x + shift / scale``
    "subtract",  # the inverse of that
    "carry",  # ``(x + shift) / scale``, for what is added to the norm's output
    "unscale",  # ``x / scale``, the same behind the first such sum
]
#: roles without a shift
SCALES: frozenset[Role] = frozenset({"scale", "unscale"})


def scale_of(role: Role) -> Role:
    """What one operand of a sum takes over where another has ``role``."""
    return "unscale" if role in ("carry", "unscale") else "scale"


def share(role: Role, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What ``role`` takes over of a map, as a scale and shift of its own."""
    if role == "map":
        return scale, shift
    if role == "scale":
        return scale, torch.zeros_like(shift)
    if role == "unscale":
        return 1 / scale, torch.zeros_like(shift)
    move = torch.where(shift == 0, shift, shift / scale)
    if role == "carry":
        return 1 / scale, move
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

    def of(self, opened: Tensor) -> Tensor:
        """Its elements of an opened parameter, which is no copy where they are all in order."""
        return opened if self._is_all(opened) else opened[self.rows]

    def put(self, opened: Tensor, values: Tensor) -> Tensor:
        """An opened parameter with other values for its elements."""
        return values if self._is_all(opened) else opened.index_copy(0, self.rows.to(opened.device), values)

    def _is_all(self, opened: Tensor) -> bool:
        return torch.equal(self.rows, torch.arange(len(opened), device=self.rows.device))

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
        consumer: Whose algebra changes the weight; None if the neighbour is a norm, a pad or a registered module.
        weight: Its weight, its table, or the parameter that it is.
        bias: Its bias.
        new_bias: Whether that bias must be created.
        gain: What its output is multiplied by before it meets the stream (LayerScale), if anything.
        factor: What the shift is multiplied by here: the number that stands between the neighbour and the norm behind
            which it stands, or one over that where it stands in front.
        norm: Index of the norm that takes it over instead, or None.
        pad: Index of the pad whose fill changes, or None.
        layer: Index of the registered module whose tensors change, or None.
    """

    name: str
    role: Role
    side: Side
    index: Tensor
    consumer: Consumer | None = None
    weight: Part | None = None
    bias: tuple[Part, ...] = ()
    new_bias: bool = False
    gain: Part | None = None
    factor: float = 1.0
    norm: int | None = None
    pad: int | None = None
    layer: int | None = None

    def agrees(self, other: Target) -> bool:
        """Whether both are one and the same change."""
        mine, others = (
            [part for part in (own.weight, own.gain, *own.bias) if part is not None] for own in (self, other)
        )
        return (
            (self.role, self.side, self.factor) == (other.role, other.side, other.factor)
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
    reasons: dict[int, Why] = field(default_factory=dict)
    untouchable: set[int] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)

    def outcomes(self, norms: Iterable[Norm]) -> tuple[NormOutcome, ...]:
        """What becomes of every norm."""
        folded = {edit.norm: edit for edit in self.edits}
        found = []
        for norm in norms:
            edit = folded.get(norm.index)
            if edit is None:
                why = self.reasons[norm.index]
                found.append(NormOutcome(norm.name, "kept", reason=why.words, codes=why.codes))
            else:
                into = dict.fromkeys(target.name for target in edit.targets)
                found.append(NormOutcome(norm.name, edit.action, tuple(into)))
        return tuple(found)
