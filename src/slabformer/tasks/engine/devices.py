"""Device, precision and ranks of a run: the one place that imports accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from slabformer._accelerate import forget_settings
from slabformer._extras import require

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def create_accelerator(precision: str = "fp32", device: str = "auto") -> Accelerator:
    """accelerate's ``Accelerator`` as the loop needs it.

    Args:
        precision: "fp32", "bf16" or "fp16".
        device: "auto" takes the accelerator where there is one; "cpu" does not.

    Raises:
        ValueError: If the device cannot compute in ``precision``, or not in several processes.
        ImportError: If accelerate is missing; names the extra that brings it.
    """
    accelerate = require("accelerate", extra="train")
    forget_settings()  # a second run may want others than the first
    # without cpu=True accelerate does not see torchrun's other processes on a machine that has nothing else
    cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerator = accelerate.Accelerator(mixed_precision=PRECISIONS[precision], cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(f"{launched} processes were launched, {accelerator.device.type} takes 1; use --device cpu")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision 'fp16' needs an accelerator; use 'bf16' or 'fp32' on a CPU")
    return accelerator


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch``, nested tuples, lists and mappings of tensors, on ``device``."""
    return require("accelerate.utils", extra="train").send_to_device(batch, device, non_blocking=True)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, by rank; accelerate's own would be this rank's alone without an ``Accelerator``."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def first_of_ranks(found: str | None) -> str | None:
    """What the first rank that found something says, the same on every rank; all must ask, whatever they found.

    A rank that raised by itself would leave the others waiting for it in their next collective.
    """
    answers = gather(found)
    rank, answer = next(((rank, answer) for rank, answer in enumerate(answers) if answer is not None), (0, None))
    return answer if answer is None or len(answers) == 1 else f"{answer} (rank {rank})"


@contextmanager
def told_to_all() -> Iterator[None]:
    """A block that ends all ranks if it fails on one, which writes files for example; all must enter it.

    Raises:
        OSError: On the ranks where it did not fail, with what failed; the others raise their own error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = first_of_ranks(None if failure is None else str(failure))
    if told is not None:
        raise failure or OSError(told)
