"""Population statistics for every RepBN, in one pass over data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from slabformer.nn.attention_masks import padding_left_out
from slabformer.nn.controls import repbn_modules
from slabformer.nn.repbn import RepBN
from slabformer.nn.statistics import check_statistics
from slabformer.ops.moments import Moments, MomentsAccumulator
from slabformer.settings import PositiveInt, checked
from slabformer.surgery.batches import NO_BATCH, eval_mode, run_batches

_END = object()


@checked
def recalibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: PositiveInt | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Replace the running statistics of every RepBN by the population mean and variance over ``batches``.

    Drop path shifts the variance that BatchNorm saw in training (Guo et al. 2024, section 4.1). As published, each norm
    normalises by its batch's statistics while all else is in eval mode; unlike published, the statistics are merged
    exactly over batches and ranks in float64 instead of averaged with momentum 0.1. Nothing is read back to the host;
    parameters, gamma and modes stay.

    Args:
        model: Edited in place, statistics only.
        batches: Tensors, ``(inputs, labels)`` or mappings of keyword arguments, whose ``attention_mask`` says which
            tokens count unless :func:`slabformer.token_mask` does; on several ranks, after
            :func:`slabformer.sync_norms_`, each brings its share, which may be empty.
        num_batches: Stop after so many; all by default.
        forward: ``forward(model, batch)``, where the model wants something else.

    Returns:
        Number of batches used.

    Raises:
        ValueError: If the model has no RepBN, ``batches`` is empty or reaches none of them, or a statistic is not
            finite (nothing is changed then).
    """
    norms = repbn_modules(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no RepBN to recalibrate; call convert_norms_(model) first")
    for norm in norms.values():
        norm.accumulator = MomentsAccumulator(norm.running_mean.numel(), norm.running_mean.device)
    try:
        with eval_mode(model), padding_left_out(model):
            count = run_batches(model, _in_step(batches, list(norms.values())), num_batches, forward)
        _write_statistics(norms)
    finally:
        for norm in norms.values():
            norm.accumulator = None
    return count


def _in_step(batches: Iterable[Any], norms: list[RepBN]) -> Iterator[Any]:
    """``batches``, with norms told whether all ranks have one: then they normalise by the statistics of all of them.

    Ranks may bring different numbers: once one has run out, the others go on with their own statistics.
    """
    sync = norms[0].sync
    together = sync is not None and sync.active
    for batch in itertools.chain(batches, [_END]):
        if together and sync is not None:
            here = torch.tensor(batch is not _END, dtype=torch.int32, device=norms[0].running_mean.device)
            dist.all_reduce(here, op=dist.ReduceOp.MIN, group=sync.group)
            together = bool(here)
        for norm in norms:
            assert norm.accumulator is not None
            norm.accumulator.normalise_together = together
        if batch is not _END:
            yield batch


@torch.no_grad()
def _write_statistics(norms: dict[str, RepBN]) -> None:
    results = {name: _result(norm) for name, norm in norms.items()}
    reached = {name: result for name, result in results.items() if result.count > 0}  # the others keep what they had
    if not reached:
        raise ValueError(NO_BATCH)
    check_statistics({name: (result.mean, result.var) for name, result in reached.items()})
    for name, result in reached.items():
        norms[name].running_mean.copy_(result.mean)
        norms[name].running_var.copy_(result.var)


def _result(norm: RepBN) -> Moments:
    """Population moments in the dtype of the buffers, where a variance may overflow."""
    assert norm.accumulator is not None
    shared = norm.sync is not None and norm.sync.active
    result = norm.accumulator.result(norm.sync.group if norm.sync is not None else None, shared)
    dtype = norm.running_mean.dtype
    return Moments(result.count, result.mean.to(dtype), result.var.to(dtype))
