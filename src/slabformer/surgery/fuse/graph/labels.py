"""How channels move through one operation of a graph.

Channels are tracked as *labels*: for every element of a tensor, the number of the channel whose scale and shift apply
to it, -1 where none does. Labels are an int tensor of the tensor's rank with size 1 along each axis that they do not
depend on: ``(1, 1, C)`` behind a norm over tokens ``(B, N, C)``. An operation that only moves elements is run on the
labels themselves, so heads, windows, patch merging and interleavings need no code of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from slabformer.surgery.fuse.refusal import RefusalError
from slabformer.surgery.fuse.tree.watch import WATCHED

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
            raise RefusalError(f"its output is an index or mask of {describe(self.node)}")
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


def describe(node: Node) -> str:
    """An operation in words."""
    if node.op == "output":
        return "the model's output"
    if node.target is WATCHED:
        return str(node.args[1])
    name = getattr(node.target, "_schema", None)
    bare = name.name.split("::")[-1] if name is not None else getattr(node.target, "__name__", str(node.target))
    return f"{'an' if bare[0] in 'aeiou' else 'a'} {bare}"


def same(call: Call) -> Tensor:
    """Every element stays where it is."""
    value = call.node.meta["val"]
    if not value.dtype.is_floating_point:
        raise RefusalError(f"its output is cast to {value.dtype}")
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
        raise RefusalError("its output is picked by a mask, so its size depends on data")
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
            raise RefusalError(f"it is followed by a padded avg_pool{spatial}d")
        return resampled(spatial)(call)

    return follow


def dropped(call: Call) -> Tensor:
    """Dropout, which does nothing in eval mode."""
    if call.arg(2, "train"):
        raise RefusalError("its output feeds a dropout that drops in eval mode too")
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
        raise RefusalError("its output is padded")
    if call.arg(2, "mode", "constant") not in ("constant", 0, 0.0) or call.arg(3, "value"):
        raise RefusalError("its output is padded with something else than zeros")
    _need_constant(labels, range(labels.ndim - len(pads) // 2, labels.ndim - (pads[:2] == [0, 0])), "padded")
    return labels


def filled(call: Call) -> Tensor:
    """A pad that may be told what to pad with, so that its size does not matter."""
    labels = call.input
    _need_constant(labels, range(labels.ndim - 1), "padded")
    return labels


def _need_constant(labels: Tensor, axes: Any, how: str) -> None:
    if any(labels.shape[axis] > 1 for axis in axes):
        raise RefusalError(f"its channels are {how}")


def chosen(call: Call) -> Labels:
    """One of the outputs of a split."""
    return call.labels[call.node.args[0]][call.node.args[1]]  # type: ignore[index, return-value]
