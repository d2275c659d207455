"""Population statistics for every RepBN, in one pass over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from slabformer.nn.controls import repbn_modules
from slabformer.ops.moments import MomentsAccumulator
from slabformer.surgery.batches import eval_mode, run_batches


def recalibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Replace the running statistics of every RepBN by the population mean and variance over ``batches``.

    Drop path shifts the variance that BatchNorm saw in training (Guo et al. 2024, section 4.1). As published, each norm
    normalises by its batch's statistics while all else is in eval mode; unlike published, the statistics are merged
    exactly over batches and ranks in float64 instead of averaged with momentum 0.1. Nothing is read back to the host;
    parameters, gamma and modes stay.

    Args:
        model: Edited in place, statistics only.
        batches: Tensors, ``(inputs, labels)`` or mappings of keyword arguments; on several ranks each brings its share.
        num_batches: Stop after so many; all by default.
        forward: ``forward(model, batch)``, where the model wants something else.

    Returns:
        Number of batches used.

    Raises:
        ValueError: If the model has no RepBN, ``batches`` is empty, or a statistic is not finite (nothing is changed
            then).
    """
    norms = list(repbn_modules(model).values())
    if not norms:
        raise ValueError(f"{type(model).__name__} has no RepBN to recalibrate; call convert_norms_(model) first")
    for norm in norms:
        norm.accumulator = MomentsAccumulator(norm.running_mean.numel(), norm.running_mean.device)
    try:
        with eval_mode(model):
            count = run_batches(model, batches, num_batches, forward)
        _write_statistics(model)
    finally:
        for norm in norms:
            norm.accumulator = None
    return count


@torch.no_grad()
def _write_statistics(model: nn.Module) -> None:
    results = {}
    for name, norm in repbn_modules(model).items():
        assert norm.accumulator is not None
        shared = norm.sync is not None and norm.sync.active
        results[name] = norm.accumulator.result(norm.sync.group if norm.sync is not None else None, shared)
    finite = torch.stack([(m.mean.isfinite() & m.var.isfinite()).all() for m in results.values()])
    if not finite.all():
        first = next(name for name, good in zip(results, finite.tolist(), strict=True) if not good)
        raise ValueError(f"statistics of {first} are not finite; check the data, or recalibrate in float32")
    for name, norm in repbn_modules(model).items():
        moments = results[name]
        if moments.count > 0:  # a norm that no batch reached keeps what it had
            norm.running_mean.copy_(moments.mean)
            norm.running_var.copy_(moments.var)
