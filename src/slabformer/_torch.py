"""Every private name of torch that this package uses, and what it does where a release of torch has it no more."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.autograd import forward_ad

# bases of torch's own classes, and a mode in which calls are seen one operator at a time; by name, for type checkers
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as Conv
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

from slabformer._private import MissingPrivateNameError, private

__all__ = [
    "HOOKS",
    "BatchNorm",
    "Conv",
    "DispatchMode",
    "NormBase",
    "aoti_compile",
    "aoti_load",
    "assert_async",
    "assume_constant_result",
    "buffer_slots",
    "child_slots",
    "compile_error",
    "forward_hooks",
    "forward_pre_hooks",
    "graph_sources",
    "in_backward",
    "in_function_transform",
    "inductor_settings",
    "is_compiled_in_place",
    "make_wrapper",
    "name_of_operator",
    "no_torch_function",
    "operator_of",
    "parameter_slots",
    "recurrent_weights",
    "schema_of",
    "storage_identity",
    "tree_leaves",
    "tree_map_of",
    "tree_map_tensors",
    "uncompiled",
    "unsaved_buffers",
    "version_of",
    "with_child",
]

T = TypeVar("T")
CHECKED_WITH = ("2.11", "2.14")
Module = TypeVar("Module", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")
#: where a module keeps the hooks on its calls, and what kind its backward hooks are
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_private = functools.partial(private, checked_with=CHECKED_WITH)
_graph_task = _private("torch._C._current_graph_task_id")
_peek_interpreter = _private("torch._C._functorch.peek_interpreter_stack")
assert_async = _private("torch._assert_async")
# for a subclass of Tensor without a storage of its own, whose operations return plain tensors
no_torch_function = _private("torch._C._disabled_torch_function_impl")
make_wrapper = _private("torch.Tensor._make_wrapper_subclass")


def in_backward() -> bool:
    """Whether autograd runs this code: for a forward that means recomputation by activation checkpointing."""
    return _graph_task() != -1


def in_function_transform() -> bool:
    """Whether :mod:`torch.func` or forward-mode differentiation runs."""
    return _peek_interpreter() is not None or forward_ad._current_level >= 0


def child_slots(module: nn.Module) -> dict[str, nn.Module | None]:
    """Children of ``module``, None where it has a place for one; a write is seen by the module."""
    return module._modules


def with_child(module: Module, name: str, child: nn.Module) -> Module:
    """A shallow copy of ``module`` that has ``child`` under ``name`` and shares all its other children."""
    made = copy.copy(module)
    made._modules = {**module._modules, name: child}
    return made


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Parameters of ``module`` itself, None where it has a place for one; a write is seen by the module."""
    return module._parameters


def buffer_slots(module: nn.Module) -> dict[str, Tensor | None]:
    """Buffers of ``module`` itself, None where it has a place for one; a write is seen by the module."""
    return module._buffers


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of its buffers that are not in the state dict; a write is seen by the module."""
    return module._non_persistent_buffers_set


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Hooks that see what ``module`` itself returns, by their keys; a write is seen by the module."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Hooks that see what ``module`` itself is called with, by their keys; a write is seen by the module."""
    return module._forward_pre_hooks


def recurrent_weights(layer: nn.Module) -> list[str]:
    """Names of the weights of an RNN, GRU or LSTM in its kernel's order; of another layer none."""
    return getattr(layer, "_flat_weights_names", [])


def uncompiled(model: Any) -> Any:
    """The model inside what ``torch.compile`` returned; any other as it is."""
    return getattr(model, "_orig_mod", model)


def schema_of(operator: Any) -> Any:
    """Names and aliases of the arguments and results of an operator in a graph; None for a function of Python."""
    return getattr(operator, "_schema", None)


def operator_of(overload: Any) -> Any:
    """``aten.add`` of ``aten.add.Tensor``."""
    return overload._overloadpacket


def name_of_operator(operator: Any) -> str | None:
    """Name of an operator in a graph; None for a function of Python."""
    return getattr(operator, "_name", None)


def tree_map_of(kind: type[T], change: Callable[[T], Any], tree: Any) -> Any:
    """``tree`` of nested containers with ``change`` of each ``kind`` in its place."""
    return _private("torch.utils._pytree.tree_map_only")(kind, change, tree)


def assume_constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """As :func:`torch.compiler.assume_constant_result`, which imports the compiler wherever it decorates."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def tree_map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` of nested containers with ``change`` of each tensor in its place."""
    return tree_map_of(Tensor, change, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """What nested containers hold."""
    return _private("torch.utils._pytree.tree_leaves")(tree)


def compile_error() -> type[Exception]:
    """What ``torch.compile`` raises for code that it cannot take."""
    return _private("torch._dynamo.exc.TorchDynamoException")


def inductor_settings(settings: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Inductor's ``settings`` for a block."""
    return _private("torch._inductor.config").patch(dict(settings))


def aoti_compile(program: Any, path: Path) -> None:
    """torch.export's ``program`` compiled ahead of time into the package ``path``, its weights inside."""
    _private("torch._inductor.aoti_compile_and_package")(program, package_path=str(path))


def aoti_load(path: Path) -> Callable[..., Any]:
    """What :func:`aoti_compile` wrote, ready to be called."""
    return _private("torch._inductor.aoti_load_package")(str(path))


def storage_identity(tensor: Tensor) -> int:
    """The same number for tensors that share memory, on the meta device too; another one for all others alive."""
    return tensor.untyped_storage()._cdata


def version_of(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written in place, other than through ``.data``; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def graph_sources() -> dict[str, str]:
    """The sources that torch.fx keeps of every graph that it has compiled; empty where it keeps them elsewhere."""
    with contextlib.suppress(MissingPrivateNameError):
        return _private("torch.fx.graph_module._loader.eval_cache")
    return {}


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None
