"""What goes into a model and comes out of it, by name and in order: what every file format asks for.

signature, flat = flatten(model, images)             # or a tuple, or a mapping of keyword arguments
tensors = flat(*signature.bind((images,), {}))       # a tuple of tensors
outputs = signature.arrange(tensors)                 # as the model returns them
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from slabformer.settings import NonEmptyStr, NonNegativeInt, NotEmpty, PositiveInt
from slabformer.surgery.outputs import tensors_by_place

#: a tensor, positional arguments, or keyword arguments
Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
#: names of axes of any length, by input
Axes = Mapping[str, Mapping[NonNegativeInt, str]]
#: of a model with one input and one output
INPUT, OUTPUT = "images", "logits"
BATCH = "batch"
Returns = Literal["tensor", "tuple", "mapping"]


@dataclass(frozen=True, kw_only=True)
class Port:
    """One tensor that goes in or comes out.

    Attributes:
        name: In the file.
        dtype: As torch calls it, without "torch.".
        shape: Of inputs; names stand for axes of any length. Empty for outputs.
    """

    name: NonEmptyStr
    dtype: NonEmptyStr
    shape: tuple[PositiveInt | NonEmptyStr, ...] = ()

    def axes(self) -> dict[int, str]:
        """Those of any length, with their names."""
        return {axis: length for axis, length in enumerate(self.shape) if isinstance(length, str)}

    def refusal(self, tensor: Tensor) -> str:
        """Why ``tensor`` does not fit; empty where it does."""
        axes = len(tensor.shape) == len(self.shape) and all(
            isinstance(wanted, str) or wanted == given for wanted, given in zip(self.shape, tensor.shape, strict=True)
        )
        if axes and str(tensor.dtype) == f"torch.{self.dtype}":
            return ""
        wanted = ", ".join(map(str, self.shape))
        return f"{self.name} must be {self.dtype} ({wanted}), got {_dtype(tensor)} {tuple(tensor.shape)}"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs and outputs in order.

    Attributes:
        inputs: What goes in.
        outputs: What comes out.
        keywords: Whether the model takes its inputs by name.
        returns: What it returns: one tensor, a tuple, or a mapping by name.
    """

    inputs: Annotated[tuple[Port, ...], NotEmpty()]
    outputs: Annotated[tuple[Port, ...], NotEmpty()]
    keywords: bool
    returns: Returns

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Arguments of a call as tensors in order.

        Raises:
            TypeError: If there are too many, too few, unknown ones, or one is no tensor.
            ValueError: If a shape or dtype is another; or batches differ.
        """
        names = [port.name for port in self.inputs]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        if len(args) + len(kwargs) != len(names) or set(given) != set(names):
            raise TypeError(
                f"the inputs are {', '.join(names)}; got {len(args)} by position and {_listed(kwargs)} by name"
            )
        tensors = [given[name] for name in names]
        for port, tensor in zip(self.inputs, tensors, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{port.name} must be a tensor, got {type(tensor).__name__}")
            if refusal := port.refusal(tensor):
                raise ValueError(refusal)
        for axis, lengths in self.lengths(tensors).items():
            if len(lengths) > 1 or 0 in lengths:
                what = "batch size" if axis == BATCH else f"number of {axis}"
                raise ValueError(f"inputs must share one {what} of at least 1, got {sorted(lengths)}")
        return tensors

    def lengths(self, tensors: Sequence[Tensor]) -> dict[str, set[int]]:
        """How long the axes of any length are in ``tensors``, by name."""
        found: dict[str, set[int]] = {}
        for port, tensor in zip(self.inputs, tensors, strict=True):
            for axis, length in zip(port.shape, tensor.shape, strict=True):
                if isinstance(axis, str):
                    found.setdefault(axis, set()).add(length)
        return found

    def arrange(self, tensors: Sequence[Tensor]) -> Any:
        """Outputs in order as the model returns them."""
        if self.returns == "tensor":
            return tensors[0]
        if self.returns == "tuple":
            return tuple(tensors)
        return {port.name: tensor for port, tensor in zip(self.outputs, tensors, strict=True)}


class FlatCall(nn.Module):
    """``model`` as a function of tensors in order that returns a tuple of them.

    Args:
        model: In eval mode.
        keywords: Names of its arguments, where it takes them by name.
    """

    def __init__(self, model: nn.Module, keywords: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self.keywords = model, tuple(keywords)
        self.train(False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the model returns, in order."""
        names = dict(zip(self.keywords, inputs, strict=True)) if self.keywords else {}
        outputs = self.model(**names) if names else self.model(*inputs)
        return tuple(tensors_by_place(outputs).values())

    def over(self, model: nn.Module) -> FlatCall:
        """The same call of another form of the model."""
        return FlatCall(model, self.keywords)


class AsWritten(nn.Module):
    """``model`` with its outputs as a file of ``signature`` returns them, however it nests them itself."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature = model, signature
        self.train(False)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The outputs by name."""
        return self.signature.arrange(tuple(tensors_by_place(self.model(*inputs, **named)).values()))


@torch.no_grad()
def flatten(
    model: nn.Module, inputs: Inputs, batch: bool = True, axes: Axes | None = None
) -> tuple[Signature, FlatCall]:
    """How ``model`` is called with ``inputs``, found by calling it.

    Args:
        model: In eval mode.
        inputs: A tensor, positional arguments, or a mapping of keyword arguments.
        batch: Whether the first axis may be of any length: of all inputs that have it in common with the first one.
        axes: Which axes may be, by input, instead; axes of one name have one length.

    Raises:
        TypeError: If an input is no tensor, or the model returns none.
        ValueError: If ``axes`` names an input or an axis that there is not.
    """
    by_name, tensors = isinstance(inputs, Mapping), in_order(inputs)
    names = list(inputs) if isinstance(inputs, Mapping) else _parameters(model, len(tensors))
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs must be tensors to be written to a file; {name} is {type(tensor).__name__}")
    flat = FlatCall(model, names if by_name else ())
    outputs = tensors_by_place(model(**dict(zip(names, tensors, strict=True))) if by_name else model(*tensors))
    if not outputs:
        raise TypeError(f"{type(model).__name__} returns no tensor: there is nothing to write")
    returns: Returns = "tensor" if set(outputs) == {""} else "tuple" if _is_sequence(outputs) else "mapping"
    named = _axes_of(names, tensors, axes) if batch else {}
    return Signature(
        inputs=tuple(_port(name, tensor, named.get(name, {})) for name, tensor in zip(names, tensors, strict=True)),
        outputs=tuple(Port(name=_output(place, names), dtype=_dtype(tensor)) for place, tensor in outputs.items()),
        keywords=by_name,
        returns=returns,
    ), flat


def in_order(inputs: Inputs) -> list[Tensor]:
    """The tensors of ``inputs``."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


def like(inputs: Inputs, tensors: Sequence[Tensor]) -> Inputs:
    """``tensors`` in the places of those of ``inputs``."""
    if isinstance(inputs, Tensor):
        return tensors[0]
    return dict(zip(inputs, tensors, strict=True)) if isinstance(inputs, Mapping) else tuple(tensors)


def _parameters(model: nn.Module, count: int) -> list[str]:
    """Names of the first positional parameters of the forward."""
    if count == 1:
        return [INPUT]
    names = list(inspect.signature(model.forward).parameters)[:count]
    return names if len(names) == count else [f"input_{index}" for index in range(count)]


def _axes_of(names: Sequence[str], tensors: Sequence[Tensor], axes: Axes | None) -> Axes:
    """Which axes are of any length, by input: those given, else the first ones that are as long as the first input's.

    Raises:
        ValueError: See :func:`flatten`.
    """
    if axes is None:
        return {
            name: {0: BATCH}
            for name, tensor in zip(names, tensors, strict=True)
            if tensor.ndim and tensors[0].ndim and len(tensor) == len(tensors[0])
        }
    num_axes = {name: tensor.ndim for name, tensor in zip(names, tensors, strict=True)}
    for name, of_input in axes.items():
        if name not in num_axes:
            raise ValueError(f"there is no input {name!r} to name axes of; the inputs are {', '.join(names)}")
        if wrong := [axis for axis in of_input if not 0 <= axis < num_axes[name]]:
            raise ValueError(f"{name} has axes 0 to {num_axes[name] - 1}, got {wrong[0]}")
    return axes


def _port(name: str, tensor: Tensor, axes: Mapping[int, str]) -> Port:
    shape = tuple(axes.get(axis, length) for axis, length in enumerate(tensor.shape))
    return Port(name=name, dtype=_dtype(tensor), shape=shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_sequence(places: Mapping[str, Tensor]) -> bool:
    return all(re.fullmatch(r"\[\d+\]", place) for place in places)


def _output(place: str, inputs: Sequence[str]) -> str:
    """``['boxes'][0]`` as ``boxes_0``: a name that files and programs take, and that no input has."""
    words = re.findall(r"\w+", place)
    name = OUTPUT if not words else "_".join(["output", *words] if words[0].isdigit() else words)
    return f"{name}_out" if name in inputs else name


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
