"""The frozen model that a student is held against."""

from __future__ import annotations

import copy as copying
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.batches import call_model, eval_mode, to_device
from slabformer.surgery.outputs import first_line

#: values of every tensor that its digest is taken from
_DIGEST_VALUES = 64
#: what a model raises that cannot run on its input
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


class Teacher:
    """A model that runs in eval mode, without gradients, and is never trained.

    A copy of ``model`` as it is now, which shares nothing that training changes: PRepBN whose gamma is 1 computes the
    norm that it still holds, so that a model may be converted and fitted before its teacher is taken.

    Memory: the weights once more for a copy, nothing for ``copy=False``; no gradients, no optimizer state, and of a
    forward only what is asked for beyond the largest layer's activations.

    Args:
        model: The teacher.
        copy: False to run ``model`` itself, which somebody else owns: its modes and ``requires_grad`` stay, and it must
            not be trained.
    """

    def __init__(self, model: nn.Module, copy: bool = True) -> None:
        self.is_copy = copy
        self.model = _frozen_copy(model) if copy else model

    @property
    def device(self) -> torch.device:
        """Where it runs, which need not be where the student is."""
        return next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Teacher:
        """Move it, in place."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        """Its output for ``batch``, which may hold labels: they are not looked at.

        Args:
            batch: As for :func:`slabformer.recalibrate_`.
            forward: The same.

        Raises:
            ValueError: If it cannot run on the batch; says which inputs that has.
        """
        batch = without_labels(to_device(batch, self.device))
        try:
            with eval_mode(self.model):
                return (forward or call_model)(self.model, batch)
        except _REFUSALS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the teacher ({type(self.model).__name__}) cannot run on {_describe(batch)}: {first_line(error)}; "
                "give batches that hold its inputs, or forward=lambda model, batch: ..."
            ) from error

    def digest(self) -> str:
        """A short name of its weights, from some values of every tensor: the same for the same teacher."""
        found = hashlib.sha256(type(self.model).__name__.encode())
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, Tensor):
                flat = tensor.detach().flatten()
                some = flat[:: max(1, len(flat) // _DIGEST_VALUES)].cpu().double()
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {some.tolist()}".encode())
        return found.hexdigest()[:16]


def without_labels(batch: Any) -> Any:
    """A mapping without what transformers' models compute their own loss from."""
    if not isinstance(batch, dict):
        return batch
    return {key: value for key, value in batch.items() if key not in ("labels", "label", "label_ids")}


def _frozen_copy(model: nn.Module) -> nn.Module:
    with _without_gradients(model):
        frozen = copying.deepcopy(model)
    frozen.eval().requires_grad_(False)
    for norm in prepbn_modules(frozen).values():
        if float(norm.gamma) == 1:
            norm.set_gamma(1)
            norm.blend_in_eval = True
    return frozen


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients are put aside meanwhile, so that they are not copied."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _describe(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"a batch of {', '.join(map(str, batch)) or 'nothing'}"
    first = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, (tuple, list)) and batch else None
    shape = f" of shape {tuple(first.shape)}" if isinstance(first, Tensor) else ""
    return f"a batch of type {type(batch).__name__}{shape}"
