"""Population statistics for the RepBN of a cell, as :func:`slabformer.recalibrate_` computes them in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.mindspore.cells import RepBN
from slabformer.mindspore.files import load, state_of, to_mindspore
from slabformer.mindspore.training.step import Forward
from slabformer.nn.controls import repbn_modules
from slabformer.nn.statistics import check_statistics
from slabformer.ops.moments import Moments, MomentsAccumulator
from slabformer.surgery.batches import NO_BATCH


def recalibrate(
    cell: Any,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_batches: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Replace the running statistics of every RepBN in ``cell`` by those of the population.

    Each norm normalises by its batch's statistics while all else is in eval mode; batches are merged in float64.

    Args:
        cell: Edited in place, statistics only.
        model: The same in torch, which tells how many tokens of an image each norm sees.
        batches: Images and labels.
        num_batches: Stop after so many; all by default.
        progress: Called after each.

    Raises:
        ValueError: If there is no batch, or a statistic is not finite; nothing is changed then.
    """
    norms = {stored: one for stored, one in _norms(cell).items() if stored in repbn_modules(model)}
    found = {name: MomentsAccumulator(one.running_mean.shape[0], torch.device("cpu")) for name, one in norms.items()}
    before, tokens = state_of(cell), dict[str, int]()
    with _observing(norms, cell) as forward:
        for images, _ in itertools.islice(batches, num_batches):
            tokens = tokens or _tokens_an_image(model, images[:1])
            forward(to_mindspore(images))
            for name, one in norms.items():
                found[name].add(_moments(one, tokens[name] * len(images)))
            progress()
    load(cell, before)
    if not tokens:
        raise ValueError(NO_BATCH)
    results = {name: accumulator.result() for name, accumulator in found.items()}
    statistics = {name: (result.mean.float(), result.var.float()) for name, result in results.items()}
    check_statistics(statistics)
    for name, (mean, var) in statistics.items():
        norms[name].running_mean.set_data(to_mindspore(mean))
        norms[name].running_var.set_data(to_mindspore(var))


def _norms(cell: Any) -> dict[str, RepBN]:
    """By the names that they have in torch."""
    found = (one for _, one in cell.cells_and_names() if isinstance(one, RepBN))
    return {one.running_mean.name.removesuffix(".running_mean"): one for one in found}


@contextmanager
def _observing(norms: dict[str, RepBN], cell: Any) -> Iterator[Any]:
    """In this block the running statistics of the norms are those of the last batch, and all else is in eval mode."""
    settings = {name: (one.momentum, one.warm_statistics) for name, one in norms.items()}
    cell.set_train(False)
    for one in norms.values():
        one.set_train(True)
        one.momentum, one.warm_statistics = 1.0, False
    try:
        yield Forward(cell)
    finally:
        cell.set_train(False)
        for name, one in norms.items():
            one.momentum, one.warm_statistics = settings[name]


def _moments(norm: RepBN, count: int) -> Moments:
    """Of a batch of ``count`` tokens, whose unbiased variance the norm keeps."""
    mean, var = (torch.from_numpy(stored.asnumpy().copy()).double() for stored in (norm.running_mean, norm.running_var))
    return Moments(torch.tensor(float(count), dtype=torch.float64), mean, var * (max(count - 1, 1) / count))


@torch.no_grad()
def _tokens_an_image(model: nn.Module, image: Tensor) -> dict[str, int]:
    """How many tokens of one image each norm sees."""
    seen: dict[str, int] = {}
    norms = repbn_modules(model)
    handles = [
        norm.register_forward_pre_hook(
            lambda norm, args, name=name: seen.__setitem__(name, args[0].numel() // norm.normalized_shape[0])
        )
        for name, norm in norms.items()
    ]
    mode = model.training
    try:
        model.eval()(image)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return seen
