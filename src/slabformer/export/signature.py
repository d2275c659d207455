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

from slabformer.settings import NonEmptyStr, NotEmpty, PositiveInt
from slabformer.surgery.outputs import tensors_by_place

#: a tensor, positional arguments, or keyword arguments
Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
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
        lengths = {tensor.shape[0] for port, tensor in zip(self.inputs, tensors, strict=True) if BATCH in port.shape}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"inputs must share one batch size of at least 1, got {sorted(lengths)}")
        return tensors

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
def flatten(model: nn.Module, inputs: Inputs, batch: bool = True) -> tuple[Signature, FlatCall]:
    """How ``model`` is called with ``inputs``, found by calling it.

    Args:
        model: In eval mode.
        inputs: A tensor, positional arguments, or a mapping of keyword arguments.
        batch: Whether the first axis may be of any length: of all inputs that have it in common with the first one.

    Raises:
        TypeError: If an input is no tensor, or the model returns none.
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
    size = tensors[0].shape[0] if batch and tensors[0].ndim else None
    return Signature(
        inputs=tuple(_port(name, tensor, size) for name, tensor in zip(names, tensors, strict=True)),
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


def _port(name: str, tensor: Tensor, batch: int | None) -> Port:
    dynamic = tensor.ndim > 0 and tensor.shape[0] == batch
    shape: tuple[int | str, ...] = (BATCH, *tensor.shape[1:]) if dynamic else tuple(tensor.shape)
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
