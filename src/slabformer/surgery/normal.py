"""Surgery makes ordinary tensors, whatever switches of torch its caller has thrown, and needs ordinary ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def makes_ordinary_tensors(function: F) -> F:
    """Decorator: inside, inference mode is off and new tensors are on the CPU unless they say otherwise.

    Parameters made in inference mode cannot be trained; those made while the meta device is the default have no values.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def need_unsharded(model: nn.Module) -> None:
    """Refuse a model whose tensors are spread over ranks.

    Raises:
        ValueError: Naming the first such tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(base.__name__ == "DTensor" for base in type(tensor).__mro__):  # importing the class costs seconds
            raise ValueError(
                f"{name} is sharded over ranks (DTensor); load the full state dict into an unsharded model first"
            )


def need_values(model: nn.Module) -> None:
    """Refuse a model on the meta device.

    Raises:
        ValueError: Naming the first tensor without values.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; load the weights first")
