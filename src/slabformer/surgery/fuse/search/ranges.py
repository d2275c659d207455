"""Refuse folds that divide by a scale near 0: half precision could not work with what comes out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from slabformer.surgery.fuse.refusal import RefusalError
from slabformer.surgery.fuse.tree.fold import gain_of, maps_after, tensor_at
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.pads import Pad
from slabformer.surgery.fuse.tree.plan import Edit, Target, share

#: larger fills stand for channels that the norm all but erases: half precision would lose the digits of the product
LARGEST_FILL = 1e3
#: a stream that is moved further than this, in units of what the norm takes for its spread, rounds visibly there
LARGEST_MOVE = 64.0


def need_range(
    model: nn.Module, norms: Sequence[Norm], pads: Sequence[Pad], before: Sequence[Edit], edit: Edit
) -> None:
    """Refuse ``edit``, made after those ``before``, where a pad's fill or a move of the stream is out of range.

    Raises:
        RefusalError: Naming the first channel.
    """
    if not any(target.pad is not None or target.role in ("add", "subtract") for target in edit.targets):
        return
    maps, fills = maps_after(norms, pads, [*before, edit])
    for target in edit.targets:
        if target.pad is not None:
            channel = first_beyond(fills[target.pad], LARGEST_FILL)
            if channel is not None:
                why = f"for {target.name} to pad in its stead"
                raise RefusalError(f"its scale of channel {channel} is too near 0 {why}")
        if target.role in ("add", "subtract"):
            _need_small_move(model, target, *maps[edit.norm])


def _need_small_move(model: nn.Module, target: Target, scale: Tensor, shift: Tensor) -> None:
    move = share(target.role, scale, shift)[1]
    channel = first_beyond(move * scale.abs().median(), LARGEST_MOVE)
    if channel is not None:
        raise RefusalError(f"its scale of channel {channel} is too near 0 to move the stream in front of it")
    if target.gain is not None and not tensor_at(model, target.gain.name).is_meta:
        own = move.cpu()[target.index[target.gain.channels]] / gain_of(model, target.gain).cpu()
        if first_beyond(own, LARGEST_FILL) is not None:
            raise RefusalError(f"{target.gain.name} is too near 0 for {target.name} to move the stream")


def first_beyond(values: Tensor, limit: float) -> int | None:
    """The first channel whose value is out of the range that half precision can work with, or None."""
    beyond = ~(values.abs() <= limit)
    return int(beyond.int().argmax()) if bool(beyond.any()) else None
