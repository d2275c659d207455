"""Enough of MindSpore, computed by torch, to run what is written for it where MindSpore is not installed.

It shows that the generator's source computes what torch computes; that MindSpore does too is tested with MindSpore.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.mindspore import runtime

WRITTEN = ("slabformer.mindspore.cells", "slabformer.mindspore.functions")


class Parameter(Tensor):
    """A tensor with a name and the attributes that code sets on MindSpore's."""

    def __new__(cls, data: Tensor, name: str = "") -> Parameter:
        made = torch.Tensor._make_subclass(cls, data.clone())
        made.given = ""
        return made

    @property
    def name(self) -> str:
        """What it was called once its model was made; empty where that is the path of its attributes."""
        return self.given

    @name.setter
    def name(self, name: str) -> None:
        self.given = name


class Cell:
    """Attributes, calls, and parameters by name."""

    def __init__(self) -> None:
        self.training = False

    def __call__(self, *args: Any) -> Any:
        return self.construct(*args)  # type: ignore[attr-defined]

    def children(self) -> Iterator[tuple[str, Any]]:
        yield from ((name, value) for name, value in vars(self).items() if isinstance(value, (Cell, Parameter)))

    def parameters_and_names(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        for name, value in self.children():
            if isinstance(value, Parameter):
                yield f"{prefix}{name}", value
            else:
                yield from value.parameters_and_names(f"{prefix}{name}.")

    def set_train(self, mode: bool = True) -> Cell:
        self.training = mode
        for _, value in self.children():
            if isinstance(value, Cell):
                value.set_train(mode)
        return self


class CellList(Cell):
    def __init__(self, cells: list[Cell]) -> None:
        super().__init__()
        for index, cell in enumerate(cells):
            setattr(self, str(index), cell)

    def __getitem__(self, index: int) -> Cell:
        return getattr(self, str(index))

    def __iter__(self) -> Iterator[Cell]:
        yield from (value for _, value in self.children())


class Identity(Cell):
    def construct(self, x: Tensor) -> Tensor:
        return x


class Dropout(Cell):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def construct(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.training)


def _conv2d(x, weight, bias, stride, pad_mode, padding, dilation, groups):  # type: ignore[no-untyped-def]
    assert pad_mode == "pad"
    return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


OPS = SimpleNamespace(
    **{
        name: getattr(torch, name)
        for name in ("relu", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "sin", "cos")
    },
    **{
        name: getattr(torch, name)
        for name in ("arange", "neg", "sigmoid", "tanh", "erf", "matmul", "clamp", "where", "tile", "flip")
    },
    **{name: getattr(torch, name) for name in ("maximum", "minimum", "cat", "stack", "unbind", "amax", "amin", "full")},
    **{
        name: getattr(torch, name)
        for name in ("split", "masked_fill", "softmax", "log_softmax", "broadcast_to", "reshape")
    },
    relu6=nn.functional.relu6,
    transpose=lambda x, axes: x.permute(axes),
    cast=lambda x, dtype: x.to(dtype),
    gather=lambda x, index, axis: x[(slice(None),) * axis + (index.long(),)],
    mean=lambda x, axes, keepdim: x.mean(axes, keepdim),
    sum=lambda x, axes, keepdim: x.sum(axes, keepdim),
    ones=lambda shape, dtype: torch.ones(shape, dtype=dtype),
    conv2d=_conv2d,
    max_pool2d=lambda x, kernel, stride: nn.functional.max_pool2d(x, kernel, stride),
    repeat_interleave=lambda x, times, axis: x.repeat_interleave(times, axis),
    stop_gradient=lambda x: x.detach(),
    assign=lambda stored, value: stored.data.copy_(value),
)


def _initializer(init: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.ones(shape, dtype=dtype) if init == "ones" else torch.zeros(shape, dtype=dtype)


def _module() -> ModuleType:
    made = ModuleType("mindspore")
    initializer = SimpleNamespace(initializer=_initializer, HeUniform=lambda slope: "zeros")
    made.__dict__.update(
        nn=SimpleNamespace(Cell=Cell, CellList=CellList, Identity=Identity, Dropout=Dropout),
        ops=OPS,
        Parameter=Parameter,
        Tensor=torch.tensor,
        common=SimpleNamespace(initializer=initializer),
        bool_=torch.bool,
        **{name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32")},
    )
    return made


@contextlib.contextmanager
def torch_as_mindspore() -> Iterator[None]:
    """In this block ``import mindspore`` gives what is above, and our cells are made of it."""
    held = {name: sys.modules.get(name) for name in ("mindspore", *WRITTEN)}
    require, package = runtime.require, importlib.import_module("slabformer.mindspore")
    stand_in = _module()
    try:
        for name in WRITTEN:
            sys.modules.pop(name, None)
        sys.modules["mindspore"] = stand_in
        runtime.require = lambda: stand_in
        yield
    finally:
        runtime.require = require
        for name, module in held.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for name in ("cells", "functions"):
            vars(package).pop(name, None)


def run_source(source: str, tensors: dict[str, Tensor], *inputs: Tensor, training: bool = False) -> Any:
    """Outputs of the model that ``source`` builds, with these tensors under its parameters' names, all of them."""
    with torch_as_mindspore(), torch.no_grad():
        names: dict[str, Any] = {}
        exec(compile(source, "<written>", "exec"), names)
        model = names["build"]()
        held = {value.name or name: value for name, value in model.parameters_and_names()}
        assert set(held) == set(tensors), set(held) ^ set(tensors)
        for name, value in tensors.items():
            assert held[name].shape == value.shape, name
            held[name].data.copy_(value)
        return model.set_train(training)(*inputs)
