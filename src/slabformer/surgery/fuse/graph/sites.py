"""The Linears, Convs, recurrent layers and sums of a traced graph: what may take a norm over, or holds what may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from slabformer.surgery.fuse.graph.labels import describe
from slabformer.surgery.fuse.refusal import RefusalError

aten = torch.ops.aten

_CONVS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_TRANSPOSED_CONVS = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
#: a Linear where what they multiply by is a parameter, written as ``x @ weight.T`` (Falcon)
_PRODUCTS = {aten.matmul.default, aten.mm.default}
EMBEDDING = aten.embedding.default
_SUMS = {aten.add.Tensor, aten.add_.Tensor}
#: they read their input by Linears; what they return is no map of it
_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}


@dataclass(frozen=True)
class Site:
    """One call of a Linear or Conv, or one by which a recurrent layer reads its input.

    Attributes:
        node: The operation.
        input: What it reads.
        weight: Its weight.
        bias: Its bias, or None.
        words: What it is, for a reason.
        axis: Axis of its channels, counted from the end.
        groups: Of a Conv.
        padded: Whether zeros are set around the input, or between its elements, so that a shift does not arrive evenly.
        transposed: Whether the weight is ``(in, out / groups, *kernel)``, as in GPT-2's Conv1D or a ConvTranspose.
    """

    node: Node
    input: Node
    weight: Any
    bias: Any
    words: str = "Linear"
    axis: int = -1
    groups: int = 1
    padded: bool = False
    transposed: bool = False

    @property
    def num_in(self) -> int:
        """Input channels."""
        shape = self.weight.meta["val"].shape
        return shape[0] if self.transposed else shape[1] * self.groups

    @property
    def num_out(self) -> int:
        """Output channels."""
        shape = self.weight.meta["val"].shape
        return shape[1] * self.groups if self.transposed else shape[0]


def site_of(node: Node) -> Site | None:
    """``node`` as a Linear or Conv, or None if it is something else."""

    def arg(position: int, name: str, default: Any = None) -> Any:
        return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)

    if node.target is aten.linear.default:
        return Site(node, arg(0, "input"), arg(1, "weight"), arg(2, "bias"))
    if node.target in _PRODUCTS and _is_parameter(arg(1, "mat2")):
        return Site(node, arg(0, "input"), arg(1, "mat2"), None, transposed=True)
    if node.target is aten.addmm.default and arg(3, "beta", 1) == arg(4, "alpha", 1) == 1:
        return Site(node, arg(1, "mat1"), arg(2, "mat2"), arg(0, "self"), transposed=True)
    operands = (arg(0, "input"), arg(1, "weight"), arg(2, "bias"))
    groups = arg(6, "groups", 1)
    spatial = _TRANSPOSED_CONVS.get(node.target)  # type: ignore[call-overload]
    if spatial is not None:
        # each output element is reached by other elements of a kernel, but for a kernel of one at each input element
        steps = (*operands[1].meta["val"].shape[2:], *arg(3, "stride", [1]))
        uneven = any(step != 1 for step in steps) or any(arg(5, "output_padding", [0]))
        words = "transposed convolution"
        return Site(node, *operands, words, axis=-1 - spatial, groups=groups, padded=uneven, transposed=True)
    spatial = _CONVS.get(node.target)  # type: ignore[call-overload]
    if spatial is None:
        return None
    padding = arg(4, "padding", [0])
    padded = padding == "same" or (not isinstance(padding, str) and any(padding))
    return Site(node, *operands, words="convolution", axis=-1 - spatial, groups=groups, padded=padded)


def _is_parameter(node: Any) -> bool:
    """Whether it is a matrix that comes from outside of the graph, transposed or not."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and node.meta["val"].ndim == 2


def readers_of_input(node: Node) -> list[Site]:
    """The Linears or Convs by which ``node`` reads its input: itself, or one a direction of a recurrent layer."""
    if node.target not in _RECURRENT:
        site = site_of(node)
        return [] if site is None else [site]
    arguments: Any = node.args
    inputs, _, weights, has_biases, num_layers, _, _, bidirectional, *_ = arguments
    num_directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * num_directions)  # of one layer in one direction: input, state, their biases
    first = [weights[start : start + size] for start in range(0, num_directions * size, size)]
    return [Site(node, inputs, w[0], w[2] if has_biases else None, words="recurrent layer") for w in first]


def operands_of(node: Node) -> list[Node]:
    """The two tensors that ``node`` is the sum of; [] if it is something else."""
    is_plain = node.target in _SUMS and node.kwargs.get("alpha", 1) == 1
    return node.all_input_nodes if is_plain and len(node.all_input_nodes) == 2 else []


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
        raise RefusalError(f"a {words} mixes another axis than its channels")
    if others:
        raise RefusalError(f"its channels are spread over several axes of the input of a {words}")
    return labels.flatten().expand(num_channels).long()


def located(node: Node) -> str:
    """An operation in words, with the module that runs it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].removeprefix("model").removeprefix(".") if stack else ""
    return f"{describe(node)} in {path}" if path else describe(node)
