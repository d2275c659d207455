"""Which samples are held out for validation: a function of the labels, a fraction and a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def held_out(labels: Sequence[int] | NDArray[np.integer], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Mark ``ceil(fraction * N)`` of ``N`` samples, every class in proportion (largest remainders round up).

    Args:
        labels: Class of every sample, ``(N,)``.
        fraction: Share to hold out, in [0, 1].
        seed: Picks the samples within a class.

    Returns:
        Boolean ``(N,)``, true where a sample is held out.

    Raises:
        ValueError: If ``fraction`` is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"validation_fraction must be in [0, 1], got {fraction}")
    labels = np.asarray(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * fraction
    counts = np.floor(exact).astype(int)
    missing = int(np.ceil(round(len(labels) * fraction, 6))) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    marked = np.zeros(len(labels), dtype=bool)
    random = np.random.default_rng(seed)
    for label, count in zip(classes, counts, strict=True):
        marked[random.permutation(np.flatnonzero(labels == label))[:count]] = True
    return marked
