"""How channels move through one operation of a graph, and the table of the operations that a norm passes.

Channels are tracked as *labels*: for every element of a tensor, the number of the channel whose scale and shift apply
to it, -1 where none does. Labels are an int tensor of the tensor's rank with size 1 along each axis that they do not
depend on: ``(1, 1, C)`` behind a norm over tokens ``(B, N, C)``. An operation that only moves elements is run on the
labels themselves, so heads, windows, patch merging and interleavings need no code of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node, map_arg

from slabformer.surgery.fuse.consumers import Registered
from slabformer.surgery.fuse.graph.trace import PAD, describe
from slabformer.surgery.reasons import Reason, RefusalError

aten = torch.ops.aten
Labels = Tensor | list[Tensor]
_VIEWS = {aten.view.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class Call:
    """One operation of a graph that reads labelled tensors.

    Attributes:
        node: The operation.
        labels: Labels of every tensor that carries some.
        fixed_size: Whether the graph is true for one input size only, so that a pad by 0 is none.
        scale_only: Whether the map has no shift, so that zeros stay zeros.
    """

    node: Node
    labels: dict[Node, Labels]
    fixed_size: bool = False
    scale_only: bool = False

    @property
    def input(self) -> Tensor:
        """Labels of the first argument."""
        found = self.labels.get(self.node.args[0])  # type: ignore[arg-type]
        if not isinstance(found, Tensor):
            raise RefusalError(Reason.FURTHER_ARGUMENT, f"its output is a further argument of {describe(self.node)}")
        return found

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, wherever it was given."""
        return self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name, default)


def compress(labels: Tensor) -> Tensor:
    """Size 1 along every axis that labels do not depend on."""
    for axis, size in enumerate(labels.shape):
        first = labels.narrow(axis, 0, 1)
        if size > 1 and (labels.stride(axis) == 0 or bool((labels == first).all())):
            labels = first
    return labels


def same(call: Call) -> Tensor:
    """Every element stays where it is."""
    value = call.node.meta["val"]
    if not value.dtype.is_floating_point:
        raise RefusalError(Reason.CAST, f"its output is cast to {value.dtype}")
    return call.input


def moved(call: Call) -> Labels:
    """Elements move: run the operation on the labels; elements from elsewhere are nobody's."""

    def stand_in(node: Node) -> Tensor:
        labels = call.labels.get(node)
        if isinstance(labels, Tensor):
            return labels.expand(node.meta["val"].shape)
        return torch.full((1,) * node.meta["val"].ndim, -1, dtype=torch.int32).expand(node.meta["val"].shape)

    args, kwargs = map_arg(call.node.args, stand_in), map_arg(dict(call.node.kwargs), stand_in)
    # labels are expanded, so not every view of the original is a view of them
    operation: Any = aten.reshape.default if call.node.target in _VIEWS else call.node.target
    result = operation(*args, **kwargs)
    return compress(result) if isinstance(result, Tensor) else [compress(item) for item in result]


def picked(call: Call) -> Tensor:
    """Elements are picked by an index tensor whose values are unknown, along axes that hold no channels."""
    labels, value = call.input, call.node.args[0].meta["val"]  # type: ignore[union-attr]
    indices = call.arg(1, "indices")
    if isinstance(indices, (list, tuple)):
        axes = [axis for axis, index in enumerate(indices) if index is not None]
        nodes = [index for index in indices if index is not None]
    else:
        axes, nodes = [indices % value.ndim], [call.arg(2, "index")]
    if any(node.meta["val"].dtype == torch.bool for node in nodes):
        raise RefusalError(Reason.PICKED_BY_MASK, "its output is picked by a mask, so its size depends on data")
    _need_constant(labels, axes, "picked by index")

    def zeros(node: Node) -> Tensor:
        if node in call.labels:
            return labels.expand(value.shape)
        return torch.zeros(node.meta["val"].shape, dtype=torch.long)

    return compress(call.node.target(*map_arg(call.node.args, zeros), **map_arg(dict(call.node.kwargs), zeros)))  # type: ignore[operator]


def averaged(call: Call) -> Tensor:
    """A mean over axes without channels: weights that sum to 1 leave the shift as it is."""
    labels = call.input
    axes, keepdim = call.arg(1, "dim"), call.arg(2, "keepdim", False)
    axes = list(range(labels.ndim)) if not axes else [axis % labels.ndim for axis in axes]
    _need_constant(labels, axes, "averaged")
    return labels if keepdim else labels.squeeze(tuple(axes))


def resampled(spatial: int) -> Callable[[Call], Tensor]:
    """Pooled or interpolated over the last axes, with weights that sum to 1."""

    def follow(call: Call) -> Tensor:
        labels = call.input
        _need_constant(labels, range(labels.ndim - spatial, labels.ndim), "resampled")
        return labels

    return follow


def pooled(spatial: int) -> Callable[[Call], Tensor]:
    """As resampled; a window over the border must not count what lies behind it."""

    def follow(call: Call) -> Tensor:
        odd = any(call.arg(3, "padding", [0])) or call.arg(4, "ceil_mode", False) or call.arg(6, "divisor_override")
        if odd and not call.scale_only:
            raise RefusalError(Reason.PADDED, f"it is followed by a padded avg_pool{spatial}d")
        return resampled(spatial)(call)

    return follow


def dropped(call: Call) -> Tensor:
    """Dropout, which does nothing in eval mode."""
    if call.arg(2, "train"):
        raise RefusalError(Reason.DROPOUT, "its output feeds a dropout that drops in eval mode too")
    return call.input


def unread(call: Call) -> Tensor:
    """A new tensor that takes nothing but shape, dtype and device from its input."""
    return torch.full((1,) * call.node.meta["val"].ndim, -1)


def padded(call: Call) -> Tensor:
    """Zeros set after the norm never saw its shift; a pad by 0 at this size may be more at another."""
    pads, labels = call.arg(1, "pad"), call.input
    if call.fixed_size and not any(pads):
        return labels
    if not call.scale_only:
        raise RefusalError(Reason.PADDED, "its output is padded")
    if call.arg(2, "mode", "constant") not in ("constant", 0, 0.0) or call.arg(3, "value"):
        raise RefusalError(Reason.PADDED, "its output is padded with something else than zeros")
    _need_constant(labels, range(labels.ndim - len(pads) // 2, labels.ndim - (pads[:2] == [0, 0])), "padded")
    return labels


def filled(call: Call) -> Tensor:
    """A pad that may be told what to pad with, so that its size does not matter."""
    labels = call.input
    _need_constant(labels, range(labels.ndim - 1), "padded")
    return labels


def _need_constant(labels: Tensor, axes: Any, how: str) -> None:
    if any(labels.shape[axis] > 1 for axis in axes):
        raise RefusalError(Reason.CHANNELS_MIXED, f"its channels are {how}")


def chosen(call: Call) -> Labels:
    """One of the outputs of a split."""
    return call.labels[call.node.args[0]][call.node.args[1]]  # type: ignore[index, return-value]


def channel_labels(node: Node, axis: int) -> Tensor:
    """Labels that number the channels of ``node`` along ``axis``."""
    value = node.meta["val"]
    shape = [1] * value.ndim
    shape[axis] = value.shape[axis]
    return torch.arange(value.shape[axis], dtype=torch.int32).view(shape)


def along(labels: Tensor, axis: int, num_channels: int, words: str) -> Tensor:
    """Labels of the channels of a Linear or Conv, ``(num_channels,)``.

    Raises:
        RefusalError: If labels depend on another axis, whose elements share one weight.
    """
    axis %= labels.ndim
    others = [other for other, size in enumerate(labels.shape) if size > 1 and other != axis]
    # one channel at most along the axis, and elements that are not the norm's (class tokens stacked, CoaT)
    if others and bool(((labels < 0) | (labels == labels.amax(axis, keepdim=True))).all()):
        raise RefusalError(Reason.OTHER_AXIS, f"a {words} mixes another axis than its channels")
    if others:
        raise RefusalError(
            Reason.CHANNELS_SPREAD, f"its channels are spread over several axes of the input of a {words}"
        )
    return labels.flatten().expand(num_channels).long()


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        ops: The operations.
        follow: Labels of the output, or RefusalError with the reason.
        example: Tokens ``(2, 4, 6)`` behind a norm to something that a Linear over its last axis may follow: its test.
        refused: Such an example that must be refused, and the code of the reason.
    """

    ops: tuple[Any, ...]
    follow: Callable[[Call], Labels]
    example: Callable[[Tensor], Tensor] | None = None
    refused: tuple[Callable[[Tensor], Tensor], Reason] | None = None


#: every operation that a norm passes, built in or registered; a new rule is one row, and its examples become its tests
RULES: list[Rule] = [
    Rule(
        (aten.view.default, aten._unsafe_view.default, aten.reshape.default),
        moved,
        lambda x: x.view(2, 2, 2, 6).reshape(8, 6),
        (lambda x: x.reshape(2, 6, 4), Reason.CHANNELS_SPREAD),
    ),
    Rule((aten.view_as.default, aten.reshape_as.default), moved, lambda x: x.view_as(x.new_empty(4, 2, 6))),
    Rule((aten.flatten.using_ints, aten.ravel.default), moved, lambda x: x.flatten(0, 1)),
    Rule((aten.unflatten.int,), moved, lambda x: x.unflatten(-1, (3, 2)).transpose(1, 2).transpose(1, 2).flatten(2)),
    Rule(
        (aten.permute.default, aten.movedim.int, aten.movedim.intlist),
        moved,
        lambda x: x.permute(2, 0, 1).movedim(0, -1),
        (lambda x: x.permute(0, 2, 1), Reason.OTHER_AXIS),
    ),
    Rule(
        (aten.transpose.int, aten.swapaxes.default, aten.t.default, aten.numpy_T.default, aten.mT.default),
        moved,
        lambda x: x.transpose(0, 1)[0].t().t(),
    ),
    Rule((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), moved, lambda x: x[:1].squeeze(0)),
    Rule((aten.unsqueeze.default,), moved, lambda x: x.unsqueeze(1)),
    Rule((aten.expand.default, aten.expand_as.default), moved, lambda x: x[:, None].expand(2, 3, 4, 6)),
    Rule((aten.broadcast_to.default,), moved, lambda x: x.broadcast_to(3, 2, 4, 6)),
    Rule((aten.repeat.default, aten.tile.default), moved, lambda x: x.repeat(1, 2, 3)),
    Rule((aten.repeat_interleave.self_int,), moved, lambda x: x.repeat_interleave(2, -1)),
    Rule(
        (aten.select.int, aten.narrow.default),
        moved,
        lambda x: x[:, 0].narrow(0, 0, 1),
    ),
    Rule((aten.slice.Tensor,), moved, lambda x: x[:, 1::2, 2:5]),
    Rule((aten.roll.default, aten.flip.default), moved, lambda x: x.roll((1, 2), (1, 2)).flip(1)),
    Rule((aten.split.Tensor, aten.split_with_sizes.default), moved, lambda x: x.split([1, 3], 1)[1].split(2, 1)[0]),
    Rule((aten.chunk.default, aten.tensor_split.sections), moved, lambda x: x.chunk(3, -1)[2].tensor_split(2, 1)[0]),
    Rule((aten.unbind.int,), moved, lambda x: x.unflatten(-1, (2, 3)).unbind(2)[1]),
    Rule((operator.getitem,), chosen, lambda x: x.unbind(0)[1]),
    Rule(
        (aten.cat.default, aten.concat.default),
        moved,
        # patch merging, and channels of another tensor beside
        lambda x: torch.cat([x[:, 0::2], x[:, 1::2], x.new_ones(2, 2, 5)], -1),
        (lambda x: torch.cat([x, x.new_zeros(2, 1, 6)], 1), Reason.CHANNELS_SPREAD),
    ),
    Rule((aten.stack.default,), moved, lambda x: torch.stack([x, x], 1)),
    Rule((aten.pixel_shuffle.default,), moved, lambda x: F.pixel_shuffle(x.mT.reshape(2, 8, 1, 3), 2).flatten(1)),
    Rule(
        (aten.pixel_unshuffle.default,),
        moved,
        lambda x: F.pixel_unshuffle(x.permute(2, 0, 1)[..., None].expand(6, 2, 4, 2), 2).flatten(1).t(),
    ),
    Rule((aten.unfold.default,), moved, lambda x: x.unfold(1, 2, 2).flatten(2)),
    Rule(
        (aten.index.Tensor,),
        picked,
        lambda x: x[:, torch.tensor([3, 0, 0])],
        (lambda x: x[:, :, torch.tensor([5, 4, 3])], Reason.CHANNELS_MIXED),
    ),
    Rule(
        (aten.index_select.default,),
        picked,
        lambda x: x.index_select(1, torch.tensor([2, 1])),
        (lambda x: x.index_select(2, torch.tensor([2, 1])), Reason.CHANNELS_MIXED),
    ),
    Rule(
        (aten.gather.default,),
        picked,
        lambda x: x.gather(1, torch.ones(2, 3, 6, dtype=torch.long)),
        (lambda x: x.gather(2, torch.ones(2, 4, 6, dtype=torch.long)), Reason.CHANNELS_MIXED),
    ),
    Rule(
        (aten.mean.dim, aten.mean.default),
        averaged,
        lambda x: x.mean(1),
        (lambda x: x.mean(-1, keepdim=True), Reason.CHANNELS_MIXED),
    ),
    Rule(
        (aten.adaptive_avg_pool1d.default,),
        resampled(1),
        lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2),
        (lambda x: F.adaptive_avg_pool1d(x, 3), Reason.CHANNELS_MIXED),
    ),
    Rule(
        (aten.adaptive_avg_pool2d.default,),
        resampled(2),
        lambda x: F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(-1, (2, 2)), 1).flatten(1),
    ),
    Rule(
        (aten.avg_pool2d.default,),
        pooled(2),
        lambda x: F.avg_pool2d(x.transpose(1, 2).unflatten(-1, (2, 2)), 2).flatten(1),
        (
            lambda x: F.avg_pool2d(x.transpose(1, 2).unflatten(-1, (2, 2)), 2, padding=1).mean((2, 3)),
            Reason.PADDED,
        ),
    ),
    Rule(
        (aten.avg_pool1d.default,),
        pooled(1),
        lambda x: F.avg_pool1d(x.mT, 2).mT,
        (lambda x: F.avg_pool1d(x.mT, 2, ceil_mode=True).mT, Reason.PADDED),
    ),
    Rule(
        (aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
        resampled(2),
        lambda x: F.interpolate(x.transpose(1, 2).unflatten(-1, (2, 2)), size=(3, 3), mode="bilinear").mean((2, 3)),
        (lambda x: F.interpolate(x[:, None], size=(4, 3)), Reason.CHANNELS_MIXED),
    ),
    Rule(
        (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec),
        resampled(2),
        lambda x: F.interpolate(
            x.mT.unflatten(-1, (2, 2)).repeat(1, 1, 3, 3), size=(4, 3), mode="bicubic", antialias=True
        ).mean((2, 3)),
    ),
    Rule((aten.upsample_linear1d.vec,), resampled(1), lambda x: F.interpolate(x.mT, size=3, mode="linear").mT),
    Rule((aten.dropout.default, aten.feature_dropout.default), dropped, lambda x: F.dropout(x, 0.5, training=False)),
    Rule(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
        ),
        same,
        lambda x: x.double().type_as(x),
        (lambda x: x.int().double(), Reason.CAST),
    ),
    Rule((aten.contiguous.default, aten.clone.default), same, lambda x: x.clone().transpose(0, 1).contiguous()),
    Rule((aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default), same, lambda x: x.detach()),
    Rule(
        (
            *(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
            *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
        ),
        unread,
        lambda x: torch.cat([x, x.new_ones(2, 4, 1), torch.zeros_like(x)], -1),
    ),
    Rule(
        (aten.pad.default, aten.constant_pad_nd.default),
        padded,
        refused=(lambda x: F.pad(x, (0, 0, 0, 0)), Reason.PADDED),
    ),
    Rule((PAD,), filled),
]
FOLLOW: dict[Any, Callable[[Call], Labels]] = {op: rule.follow for rule in RULES for op in rule.ops}
#: products with a number, and by what they multiply: passed only where that is noted, since a shift scales with it
NUMBERS: dict[Any, Callable[[float], float]] = {
    aten.mul.Tensor: lambda number: number,
    aten.div.Tensor: lambda number: 1 / number,
}
#: checks on shape and dtype that the tracer inserts; they hold after folding as before
CHECKS = {aten._assert_tensor_metadata.default}


def register_rule(rule: Rule) -> Registered:
    """Let norms fold through operations, such as custom ones of ``torch.library``.

    Args:
        rule: The operations and how they move channels: :func:`moved` for those that only move elements and run on
            integers, :func:`same` for those that leave every element in its place, or a function of one's own.

    Returns:
        A handle whose ``remove()`` takes it out again.

    Raises:
        TypeError: If it is no :class:`Rule`.
        ValueError: If it names no operation, or one that has a rule.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"register_rule takes a Rule, got {type(rule).__name__}")
    if not rule.ops:
        raise ValueError("a rule names at least one operation, such as torch.ops.mylib.shuffle.default")
    taken = [op for op in rule.ops if op in FOLLOW]
    if taken:
        raise ValueError(f"{taken[0]} has a rule already")
    RULES.append(rule)
    FOLLOW.update(dict.fromkeys(rule.ops, rule.follow))
    return Registered(lambda: _unregister(rule))


def _unregister(rule: Rule) -> None:
    if rule in RULES:
        RULES.remove(rule)
        for op in rule.ops:
            del FOLLOW[op]
