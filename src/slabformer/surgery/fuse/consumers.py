"""What may take a norm over: one class a kind of layer, with its algebra, its place in a graph, and a sample.

A norm is ``x * scale + shift`` per channel. A layer that reads ``x * scale + shift`` takes it over by
:meth:`Consumer.take_input`, one that computes ``x`` by :meth:`Consumer.take_output`. Layers are found in a traced graph
by the operation that they call; a :class:`ModuleConsumer` is found by its class and stays one call, whatever it
computes. A new kind is one class and :func:`register_consumer`; its sample becomes its test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from slabformer.ops.affine import fold_into_next, fold_into_previous

aten = torch.ops.aten
#: where a neighbour stands: behind the norm, in whose input it has the map, or in front, in whose output it has it
Side = Literal["next", "previous"]
Tensors = Mapping[str, Tensor]
#: key of a node's ``meta``: whether it does not depend on the model's inputs
CONSTANT = "slabformer_constant"


@dataclass(frozen=True)
class Sample:
    """A tiny layer that a consumer is tested with.

    Attributes:
        build: Makes it.
        shape: Of its input.
        channel_dim: Axis of the channels, -1 or 1.
        num_tokens: Of an input of tokens, which are integers below it; 0 for an input of floats.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 4, 6)
    channel_dim: int = -1
    num_tokens: int = 0

    def input(self) -> Tensor:
        """Random, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        if self.num_tokens:
            return torch.randint(self.num_tokens, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Site:
    """One call of a layer in a graph.

    Attributes:
        node: The operation.
        consumer: What kind of layer it is.
        input: What it reads; None where that has no channels, as the tokens of an embedding.
        weight: Its weight.
        bias: Its bias, or None.
        axis: Axis of the channels, counted from the end.
        groups: Of a Conv.
        padded: Whether zeros are set around the input, or between its elements, so that a shift does not arrive evenly.
        transposed: Whether the weight is ``(in, out / groups, *kernel)``, as in GPT-2's Conv1D or a ConvTranspose.
    """

    node: Node
    consumer: Consumer
    input: Node | None
    weight: Any
    bias: Any = None
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


class Consumer:
    """A kind of layer that may take a norm over.

    Attributes:
        words: What it is called in a reason.
        samples: Tiny layers of this kind.
        ops: The operations of a traced graph by which it is called.
        reads: Whether a norm in front of it may go into it.
        writes: Whether its output is an affine map of its input, so that a norm behind it may go into it.
        needs_bias: Whether a shift goes into a bias, which is created where there is none.
    """

    words: ClassVar[str] = "layer"
    samples: ClassVar[tuple[Sample, ...]] = ()
    ops: ClassVar[Iterable[Any]] = ()
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    needs_bias: ClassVar[bool] = True

    def sites(self, node: Node) -> list[Site]:
        """The layers that ``node``, a call of one of ``ops``, is; several where it reads its input by several weights.

        [] where this call is none, as a product of two activations.
        """
        raise NotImplementedError

    def take_input(self, tensors: Tensors, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Weights of a layer that does for ``x`` what it did for ``x * scale + shift``.

        Args:
            tensors: "weight" ``(O, I / groups, *kernel)``, and "bias" ``(O,)`` where there is one; float64.
            scale: Of the input channels, ``(I,)``, float64.
            shift: The same.

        Returns:
            The new values by the same names; of a new bias too.
        """
        groups = len(scale) // tensors["weight"].shape[1]
        weight, bias = fold_into_next(tensors["weight"], tensors.get("bias"), scale, shift, groups)
        return {"weight": weight, "bias": bias}

    def take_output(self, tensors: Tensors, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Weights of a layer that returns ``y * scale + shift`` where it returned ``y``; as for :meth:`take_input`."""
        weight, bias = fold_into_previous(tensors["weight"], tensors.get("bias"), scale, shift)
        return {"weight": weight, "bias": bias}


class ModuleConsumer(Consumer):
    """A class of modules that may take a norm over: one opaque call in the graph, whatever its forward computes.

    The first argument of its forward is what holds the channels, and it returns one tensor. ``tensors`` of
    :meth:`take_input` and :meth:`take_output` are its parameters and buffers by name, float64; both return new values
    of the same shapes for those that change. What they return is tried in float64 before the model is touched.

    Attributes:
        module: The class; subclasses with a forward of their own are not meant.
        in_dim: Axis of the input's channels.
        out_dim: Axis of the output's.
    """

    module: ClassVar[type[nn.Module]]
    in_dim: ClassVar[int] = -1
    out_dim: ClassVar[int] = -1

    def check(self, module: nn.Module, side: Side) -> None:
        """Raise :class:`RefusalError` where ``module`` cannot take a norm over on this side."""

    def take_input(self, tensors: Tensors, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """New tensors of a module that does for ``x`` what it did for ``x * scale + shift``."""
        raise NotImplementedError

    def take_output(self, tensors: Tensors, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """New tensors of a module that returns ``y * scale + shift`` where it returned ``y``."""
        raise NotImplementedError


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _operands(node: Node) -> tuple[Node, Any, Any]:
    """Input, weight and bias."""
    return _argument(node, 0, "input"), _argument(node, 1, "weight"), _argument(node, 2, "bias")


class Linear(Consumer):
    """``nn.Linear``, GPT-2's Conv1D, and a product with a matrix of parameters, ``x @ weight.T`` (Falcon)."""

    words = "Linear"
    ops = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)
    samples = (Sample(lambda: nn.Linear(6, 5)), Sample(lambda: nn.Linear(6, 5, bias=False)))

    def sites(self, node: Node) -> list[Site]:
        """Its operands; none of a product of two activations."""
        if node.target is aten.linear.default:
            return [Site(node, self, *_operands(node))]
        if node.target is aten.addmm.default:
            is_plain = _argument(node, 3, "beta", 1) == _argument(node, 4, "alpha", 1) == 1
            bias, x, weight = (_argument(node, i, name) for i, name in enumerate(("self", "mat1", "mat2")))
            return [Site(node, self, x, weight, bias, transposed=True)] if is_plain else []
        x, weight = _argument(node, 0, "self"), _argument(node, 1, "mat2")
        is_matrix = weight.meta.get(CONSTANT, False) and weight.meta["val"].ndim == 2
        return [Site(node, self, x, weight, transposed=True)] if is_matrix else []


class Convolution(Consumer):
    """``nn.Conv1d``, ``2d`` and ``3d``; a shift goes into those without padding."""

    words = "convolution"
    spatial: ClassVar[dict[Any, int]] = {
        aten.conv1d.default: 1,
        aten.conv2d.default: 2,
        aten.conv3d.default: 3,
        aten.conv1d.padding: 1,
        aten.conv2d.padding: 2,
        aten.conv3d.padding: 3,
    }
    ops = spatial
    samples = (
        Sample(lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5), 1),
        Sample(lambda: nn.Conv1d(6, 4, 2, padding="valid"), (2, 6, 5), 1),
    )

    def sites(self, node: Node) -> list[Site]:
        """Its operands, and whether zeros surround the input."""
        x, weight, bias = _operands(node)
        padding = _argument(node, 4, "padding", [0])
        padded = padding == "same" or (not isinstance(padding, str) and any(padding))
        axis, groups = -1 - self.spatial[node.target], _argument(node, 6, "groups", 1)
        return [Site(node, self, x, weight, bias, axis=axis, groups=groups, padded=padded)]


class TransposedConvolution(Consumer):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``; a shift goes into those with a kernel and a stride of 1."""

    words = "transposed convolution"
    spatial: ClassVar[dict[Any, int]] = {
        aten.conv_transpose1d.default: 1,
        aten.conv_transpose2d.input: 2,
        aten.conv_transpose3d.input: 3,
    }
    ops = spatial
    samples = (Sample(lambda: nn.ConvTranspose2d(6, 4, 1, groups=2), (2, 6, 5, 5), 1),)

    def sites(self, node: Node) -> list[Site]:
        """Its operands, and whether a kernel reaches some outputs more often than others."""
        x, weight, bias = _operands(node)
        # each output element is reached by other elements of a kernel, but for a kernel of one at each input element
        steps = (*weight.meta["val"].shape[2:], *_argument(node, 3, "stride", [1]))
        uneven = any(step != 1 for step in steps) or any(_argument(node, 5, "output_padding", [0]))
        axis, groups = -1 - self.spatial[node.target], _argument(node, 6, "groups", 1)
        return [Site(node, self, x, weight, bias, axis=axis, groups=groups, padded=uneven, transposed=True)]


class Recurrent(Consumer):
    """``nn.LSTM``, ``GRU`` and ``RNN``: each direction reads its input by a Linear, and returns no map of it."""

    words = "recurrent layer"
    ops = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
    samples = (Sample(lambda: nn.LSTM(6, 5, bidirectional=True)), Sample(lambda: nn.GRU(6, 5)))
    writes = False

    def sites(self, node: Node) -> list[Site]:
        """The first layer of each direction."""
        arguments: Any = node.args
        inputs, _, weights, has_biases, num_layers, _, _, bidirectional, *_ = arguments
        num_directions = 2 if bidirectional else 1
        size = len(weights) // (num_layers * num_directions)  # of one layer in one direction: input, state, biases
        first = [weights[start : start + size] for start in range(0, num_directions * size, size)]
        return [Site(node, self, inputs, w[0], w[2] if has_biases else None) for w in first]


class Constant(Consumer):
    """Elements that are what a norm's channels are made of, such as a position table or a class token."""

    words = "parameter"
    reads, needs_bias = False, False

    def take_output(self, tensors: Tensors, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """The elements, mapped."""
        shape = (-1, *[1] * (tensors["weight"].ndim - 1))
        return {"weight": tensors["weight"] * scale.view(shape) + shift.view(shape)}


class Embedding(Constant):
    """``nn.Embedding``: both scale and shift go into the rows of its table."""

    words = "embedding"
    ops = (aten.embedding.default,)
    samples = (Sample(lambda: nn.Embedding(7, 6), (2, 4), num_tokens=7),)

    def sites(self, node: Node) -> list[Site]:
        """Its table."""
        return [Site(node, self, None, node.args[0], transposed=True)]


#: what is not found by an operation: parameters that are read as they are
CONSTANTS = Constant()
#: every kind of layer that may take a norm over, built in or registered
CONSUMERS: list[Consumer] = [Linear(), Convolution(), TransposedConvolution(), Recurrent(), Embedding()]
_BY_OP: dict[Any, Consumer] = {op: consumer for consumer in CONSUMERS for op in consumer.ops}


@dataclass(frozen=True)
class Registered:
    """What was added to a table.

    Attributes:
        undo: Takes it out.
    """

    undo: Callable[[], None]

    def remove(self) -> None:
        """Take it out of the table again; a second time does nothing."""
        self.undo()


def register_consumer(kind: type[Consumer]) -> Registered:
    """Let norms fold into a kind of layer.

    Args:
        kind: A :class:`ModuleConsumer` for modules of a class, or a :class:`Consumer` for calls of operations, such as
            a custom one of ``torch.library``.

    Returns:
        A handle whose ``remove()`` takes it out again.

    Raises:
        TypeError: If it is no such class.
        ValueError: If it names neither a class of modules nor operations, or ones that have a consumer.
    """
    if not (isinstance(kind, type) and issubclass(kind, Consumer)):
        raise TypeError(f"register_consumer takes a subclass of Consumer or ModuleConsumer, got {kind!r}")
    if issubclass(kind, ModuleConsumer):
        module = getattr(kind, "module", None)
        if not (isinstance(module, type) and issubclass(module, nn.Module)):
            raise ValueError(f"{kind.__name__}.module must be a class of modules, got {module!r}")
        if any(isinstance(other, ModuleConsumer) and other.module is module for other in CONSUMERS):
            raise ValueError(f"{module.__name__} has a consumer already; remove() that one first")
    elif not kind.ops:
        raise ValueError(f"{kind.__name__}.ops is empty; name operations such as torch.ops.mylib.linear.default")
    taken = [op for op in kind.ops if op in _BY_OP]
    if taken:
        raise ValueError(f"{taken[0]} has a consumer already: {type(_BY_OP[taken[0]]).__name__}")
    consumer = kind()
    CONSUMERS.append(consumer)
    _BY_OP.update(dict.fromkeys(kind.ops, consumer))
    return Registered(lambda: _unregister(consumer))


def _unregister(consumer: Consumer) -> None:
    if consumer in CONSUMERS:
        CONSUMERS.remove(consumer)
        for op in consumer.ops:
            del _BY_OP[op]


def consumer_of(module: nn.Module) -> ModuleConsumer | None:
    """What was registered for modules such as ``module``."""
    forward = type(module).forward
    return next((c for c in CONSUMERS if isinstance(c, ModuleConsumer) and forward is c.module.forward), None)


def sites_of(node: Node) -> list[Site]:
    """The layers that ``node`` is a call of."""
    consumer = _BY_OP.get(node.target)
    return [] if consumer is None else consumer.sites(node)


def readers_at(node: Node) -> list[Site]:
    """The layers by which ``node`` reads its input: one, or one a direction of a recurrent layer."""
    return [site for site in sites_of(node) if site.consumer.reads]


def writer_at(node: Node) -> Site | None:
    """The layer whose output ``node`` is, if that is an affine map."""
    return next((site for site in sites_of(node) if site.consumer.writes), None)
