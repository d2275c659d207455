"""Switches over all norms of a model: token masks, ranks that share statistics, the blend in eval, an EMA's gamma."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from slabformer.nn.prepbn import PRepBN
from slabformer.nn.repbn import RepBN
from slabformer.nn.sync import StatisticsSync


def prepbn_modules(model: nn.Module) -> dict[str, PRepBN]:
    """Every PRepBN of ``model`` by name, tied ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PRepBN)}


def repbn_modules(model: nn.Module) -> dict[str, RepBN]:
    """Every RepBN of ``model`` by name, those inside PRepBN included, tied ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RepBN)}


def set_token_mask(model: nn.Module, mask: Tensor | None) -> None:
    """Let only the tokens where ``mask`` is true move the statistics of ``model``'s norms, until set again.

    Args:
        mask: Boolean ``(B, N)``, true for valid tokens; None for all.

    Raises:
        ValueError: If ``mask`` is not boolean. A mask that does not fit the tokens is refused in the forward.
    """
    if mask is not None and mask.dtype.is_floating_point:
        raise ValueError(f"token mask must be boolean, true where a token is valid, got {mask.dtype}")
    for module in repbn_modules(model).values():
        module.token_mask = None if mask is None else mask.bool()


@contextmanager
def token_mask(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """:func:`set_token_mask` for the duration of a block; keep ``backward()`` inside under activation checkpointing."""
    before = {module: module.token_mask for module in repbn_modules(model).values()}
    set_token_mask(model, mask)
    try:
        yield
    finally:
        for module, previous in before.items():
            module.token_mask = previous


def sync_norms_(model: nn.Module, enabled: bool = True, process_group: dist.ProcessGroup | None = None) -> None:
    """Share the batch statistics of every RepBN between the ranks of ``process_group`` (all ranks by default)."""
    sync = StatisticsSync(process_group) if enabled else None
    for module in repbn_modules(model).values():
        module.sync = sync


@contextmanager
def blended(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluate ``gamma * LN(x) + (1 - gamma) * RepBN(x)`` instead of RepBN alone inside the block."""
    modules = list(prepbn_modules(model).values())
    before = [module.blend_in_eval for module in modules]
    for module in modules:
        module.blend_in_eval = True
    try:
        yield model
    finally:
        for module, previous in zip(modules, before, strict=True):
            module.blend_in_eval = previous


def copy_gamma_(source: nn.Module, target: nn.Module) -> None:
    """Copy gamma and phase from ``source`` to ``target``, whose averaged copy (an EMA's) means nothing.

    Norms are paired in the order of the modules, so either may be wrapped (DistributedDataParallel, ``torch.compile``).

    Raises:
        ValueError: If the two do not hold PRepBN modules of the same widths.
    """
    norms, copies = list(prepbn_modules(source).values()), list(prepbn_modules(target).values())
    if [norm.normalized_shape for norm in norms] != [copy.normalized_shape for copy in copies]:
        raise ValueError(f"source has {len(norms)} PRepBN modules, target {len(copies)}, not of the same widths")
    for norm, copy in zip(norms, copies, strict=True):
        copy.gamma.copy_(norm.gamma)
        copy.phase = norm.phase
