"""A reference to be beaten: a bigram model, interpolated with unigrams and the uniform distribution.

``p(w | v) = a c(v, w) / c(v) + b c(w) / n + c / V`` (Jelinek and Mercer 1980), with ``a + b + c = 1`` for each bucket
of how often ``v`` was seen. The weights are tuned by expectation maximisation **on the very text that is then scored**,
in the reference's favour.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from slabformer.tasks.language.packing import IGNORED, Block
from slabformer.tasks.language.perplexity import Perplexity

ROUNDS = 100


def bigram_perplexity(train: Iterable[Block], held_out: Iterable[Block], vocab_size: int) -> Perplexity:
    """Of the tokens of ``held_out`` that have a label, counted on those of ``train``."""
    before, after = _pairs(train)
    keys, counts = np.unique(before * vocab_size + after, return_counts=True)
    context = np.bincount(before, minlength=vocab_size)
    unigram = np.bincount(after, minlength=vocab_size) / len(after)

    v, w = _pairs(held_out)
    place = np.searchsorted(keys, v * vocab_size + w).clip(max=len(keys) - 1)
    seen = np.where(keys[place] == v * vocab_size + w, counts[place], 0)
    parts = np.stack([seen / context[v].clip(min=1), unigram[w], np.full(len(v), 1 / vocab_size)], 1)  # (N, 3)
    bucket = np.log2(context[v] + 1).astype(int)
    mixed = sum(np.log(_best_mixture(parts[bucket == b])).sum() for b in np.unique(bucket))
    return Perplexity(float(-mixed), len(v))


def _best_mixture(parts: np.ndarray) -> np.ndarray:
    """Probabilities ``(N,)`` of the mixture of the columns of ``parts`` ``(N, 3)`` that makes them likeliest."""
    weights = np.full(parts.shape[1], 1 / parts.shape[1])
    for _ in range(ROUNDS):
        joint = parts * weights
        weights = (joint / joint.sum(1, keepdims=True)).mean(0)
    return parts @ weights


def _pairs(blocks: Iterable[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that have a label, and the ones before them."""
    before, after = [], []
    for block in blocks:
        labels = block["labels"].numpy()[1:]
        kept = labels != IGNORED
        before.append(block["input_ids"].numpy()[:-1][kept])
        after.append(labels[kept])
    return np.concatenate(before), np.concatenate(after)
