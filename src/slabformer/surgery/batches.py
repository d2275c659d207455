"""Run a model over batches of whatever shape a loader yields."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NO_BATCH = "there was no batch to run; is the loader empty, or used up?"


def run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Call ``model`` on each batch under ``no_grad`` and return how many there were.

    A tensor is the input, the first of a tuple or list is the input (the rest are labels), a mapping holds keyword
    arguments; ``forward(model, batch)`` overrides this. Tensors are moved to the model's device.

    Raises:
        TypeError: If a batch is none of these.
    """
    device = model_device(model)
    count = 0
    with torch.no_grad():
        for batch in itertools.islice(batches, num_batches):
            (forward or call_model)(model, to_device(batch, device))
            count += 1
    return count


def model_device(model: nn.Module) -> torch.device:
    """Where its first parameter is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def call_model(model: nn.Module, batch: Any) -> Any:
    """The output of ``model`` for ``batch``, as :func:`run_batches` feeds it.

    Raises:
        TypeError: If it cannot be fed.
    """
    args, kwargs = as_arguments(batch)
    return model(*args, **kwargs)


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments by which a model is fed ``batch``.

    Raises:
        TypeError: If it cannot be fed.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    raise TypeError(f"cannot feed a batch of type {type(batch).__name__}; pass forward=lambda model, batch: ...")


def to_device(value: Any, device: torch.device) -> Any:
    """``value``, nested tuples, lists and mappings of tensors, on ``device``; mappings become dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_device(item, device) for item in value]
    return value


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode inside, every module's own mode restored afterwards, also after an error."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
