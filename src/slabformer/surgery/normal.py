"""Surgery makes ordinary tensors, whatever switches of torch its caller has thrown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

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
