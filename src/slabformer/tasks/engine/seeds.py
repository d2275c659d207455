"""Random numbers that depend on where training is, not on how it got there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from slabformer.tasks.engine.order import Stream


def reseed(*keys: int) -> None:
    """Seed torch, NumPy and Python from ``keys``, e.g. ``(seed, step, rank)``.

    Called at the start of every optimizer step: mixup and drop path then draw the same numbers in a resumed run as in
    one that was never interrupted.
    """
    words = np.random.SeedSequence(keys).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # the generator that timm's mixup draws from
    random.seed(int(words[3]))


def random_state() -> dict[str, Any]:
    """Where the generators of this process stand, as tensors and plain values."""
    name, key, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.from_numpy(np.asarray(key, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))


@contextmanager
def draws_from(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed Python, numpy and torch (CPU) from ``(seed, epoch, index)`` for a block, then put them back."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    words = np.random.SeedSequence((Stream.AUGMENT, seed, epoch, index)).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
