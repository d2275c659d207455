"""What the loop is given: its settings, and what it expects of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from slabformer.tasks.engine.nonfinite import tensors_in

#: the loss of a batch, or its parts by name: their sum is the loss
StepFn = Callable[[nn.Module, Any], Tensor | dict[str, Tensor]]
Item = TypeVar("Item")


class Loader(Protocol):
    """Batches of an epoch, the same ones whenever asked again."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def __iter__(self) -> Iterator[Any]:
        """The epoch's batches, from the start that was set."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation come next."""

    def set_start(self, batch_index: int) -> None:
        """Skip so many batches in the next iteration."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the loop itself."""

    epochs: int
    """Passes over the data."""
    seed: int = 0
    """Mixup, drop path and dropout draw from (seed, step, rank)."""
    accumulate: int = 1
    """Batches an optimizer step."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None does not clip."""
    log_every: int = 50
    """Optimizer steps between logged ones; between them nothing is read back from an accelerator."""
    save_every: int = 0
    """Optimizer steps between checkpoints, beside the one of every epoch; 0 for none."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    compile: bool = False
    """Train through torch.compile."""


@dataclass(kw_only=True)
class Position:
    """Where training is; an epoch whose batches are all used still waits for its evaluation."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


def num_samples(batch: Any) -> int:
    """Length of the first tensor in a container of tensors; any other ``batch`` knows its own."""
    return len(next(tensors_in(batch))) if isinstance(batch, (tuple, list, Mapping)) else len(batch)


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """``items`` in lists of ``size``; the last one may be shorter."""
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window
