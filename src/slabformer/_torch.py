"""Every private name of torch that this package uses, and what it does where a release of torch has it no more."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad

# bases of torch's own classes, and a mode in which calls are seen one operator at a time; by name, for type checkers
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as Conv
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

from slabformer._private import MissingPrivateNameError, private

__all__ = [
    "BatchNorm",
    "Conv",
    "DispatchMode",
    "NormBase",
    "assert_async",
    "compile_error",
    "graph_sources",
    "in_backward",
    "in_function_transform",
    "inductor_settings",
    "is_compiled_in_place",
    "storage_identity",
    "tree_leaves",
    "tree_map_tensors",
    "version_of",
]

CHECKED_WITH = ("2.11", "2.14")
_private = functools.partial(private, checked_with=CHECKED_WITH)
_graph_task = _private("torch._C._current_graph_task_id")
_peek_interpreter = _private("torch._C._functorch.peek_interpreter_stack")
assert_async = _private("torch._assert_async")


def in_backward() -> bool:
    """Whether autograd runs this code: for a forward that means recomputation by activation checkpointing."""
    return _graph_task() != -1


def in_function_transform() -> bool:
    """Whether :mod:`torch.func` or forward-mode differentiation runs."""
    return _peek_interpreter() is not None or forward_ad._current_level >= 0


def tree_map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` of nested containers with ``change`` of each tensor in its place."""
    return _private("torch.utils._pytree.tree_map_only")(Tensor, change, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """What nested containers hold."""
    return _private("torch.utils._pytree.tree_leaves")(tree)


def compile_error() -> type[Exception]:
    """What ``torch.compile`` raises for code that it cannot take."""
    return _private("torch._dynamo.exc.TorchDynamoException")


def inductor_settings(settings: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Inductor's ``settings`` for a block."""
    return _private("torch._inductor.config").patch(dict(settings))


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
