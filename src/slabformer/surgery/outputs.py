"""What a model returns, every tensor by its place, whatever it is wrapped in; and what it says when it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

#: compared by ``==``, where tensors are compared by their entries
Plain = str | bytes | None
#: not searched, though they have attributes
_WITHOUT_TENSORS = (type, nn.Module, torch.dtype, torch.device, torch.SymInt, torch.SymFloat, torch.SymBool)


def leaves(output: Any) -> dict[str, Tensor | Plain]:
    """Every tensor, number and text in ``output`` by its place, such as ``.logits`` or ``['boxes'][0]``.

    Containers, dataclasses, transformers' outputs and other objects' attributes are searched. Numbers and numpy arrays
    come as tensors, complex and quantised tensors as floating point ones; a tensor that is the output itself has the
    place ``""``.
    """
    return {place: _comparable(leaf) for place, leaf in _walk(output, "", frozenset(), set())}


def why_not_comparable(tensor: Tensor) -> str:
    """Why no output can be held against ``tensor``; empty where one can. Infinities among finite entries can."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return ""
    nan = int(tensor.isnan().sum())
    if nan:
        return f"NaN in {nan} of {tensor.numel()} entries"
    return "" if tensor.isfinite().any() else "infinite in every entry"


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor that ``value`` holds, as it is: containers, transformers' outputs and other objects' attributes."""
    return list(tensors_by_place(value).values())


def tensors_by_place(value: Any) -> dict[str, Tensor]:
    """The same by their places, such as ``['logits']``; a tensor that is the value itself has the place ``""``."""
    return {place: leaf for place, leaf in _walk(value, "", frozenset(), set()) if isinstance(leaf, Tensor)}


def _walk(value: Any, place: str, above: frozenset[int], objects: set[int]) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers, texts and None in ``value``; containers once per place, other objects once."""
    if value is None or isinstance(value, (Tensor, str, bytes, bool, int, float, complex)):
        yield place, value
    elif isinstance(value, Enum):
        yield place, str(value)
    elif hasattr(value, "__array__") and hasattr(value, "dtype"):
        numeric = value.dtype.kind in "biufc"
        yield from _walk(torch.as_tensor(value) if numeric else value.tolist(), place, above, objects)
    elif id(value) not in above | objects and not isinstance(value, _WITHOUT_TENSORS):
        if not isinstance(value, (Mapping, Collection)):
            objects.add(id(value))
        for key, item in _children(value):
            yield from _walk(item, place + key, above | {id(value)}, objects)


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return ((f"[{key!r}]", item) for key, item in value.items())
    if dataclasses.is_dataclass(value):
        return ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, (list, tuple)) or not hasattr(value, "__dict__"):
        items = sorted(value, key=repr) if isinstance(value, Set) else value if isinstance(value, Collection) else ()
        return ((f"[{index}]", item) for index, item in enumerate(items))
    return ((f".{key}", item) for key, item in vars(value).items())


def _comparable(leaf: Any) -> Tensor | Plain:
    if leaf is None or isinstance(leaf, (str, bytes)):
        return leaf
    if isinstance(leaf, Tensor):
        return _plain(leaf)
    return _plain(torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None))


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
