"""Perplexity against definitions, and the bigram reference against one counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from language_models import tokens, trained_looking
from slabformer.tasks.language.bigram import bigram_perplexity
from slabformer.tasks.language.packing import IGNORED, Block, PackedBlocks, batches_of
from slabformer.tasks.language.perplexity import Perplexity, perplexity, windows


def labelled(ids: torch.Tensor) -> Block:
    return {"input_ids": ids, "labels": ids}


def test_perplexity_is_the_exponential_of_the_models_own_loss() -> None:
    model, ids = trained_looking().train(), tokens(3, 20)
    found = perplexity(model, [labelled(ids[:2]), labelled(ids[2:])])
    assert model.training
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.tokens == 3 * 19


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_windows_predict_every_token_but_the_first_once_with_enough_before_it(stride: int) -> None:
    document, context = list(range(100, 123)), 8
    seen: list[int] = []
    for window in windows([document, [7]], context, stride):
        ids, labels = window["input_ids"].tolist(), window["labels"].tolist()
        assert len(ids) <= context
        predicted = [index for index, label in enumerate(labels) if index and label != IGNORED]
        assert [labels[index] for index in predicted] == [ids[index] for index in predicted]
        if seen:
            assert min(predicted) >= context - stride
        seen += [labels[index] for index in predicted]
    assert seen == document[1:]


def test_windows_over_a_short_document_give_its_plain_loss() -> None:
    model, ids = trained_looking(), tokens(1, 30)
    whole = perplexity(model, [labelled(ids)])
    assert perplexity(model, batches_of(windows([ids[0].tolist()], 64, 32), 4)).nll == pytest.approx(
        whole.nll, rel=1e-6
    )
    with torch.no_grad():
        logits = model(input_ids=ids[:, -16:]).logits[0, -2]
    last = F.cross_entropy(logits, ids[0, -1]).item()
    *_, window = windows([ids[0].tolist()], 16, 1)
    assert perplexity(model, batches_of([window], 1)).nll == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("stride", [0, 8])
def test_a_stride_that_skips_tokens_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=r"stride must be in \[1, 7\]"):
        list(windows([[1, 2, 3]], 8, stride))


def test_nothing_to_predict_is_told() -> None:
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(trained_looking(), [])


def test_an_overflowing_perplexity_is_infinite_and_bits_are_counted_by_byte() -> None:
    assert Perplexity(8000.0, 10).perplexity == math.inf
    assert Perplexity(math.log(2) * 24, 10).bits_per_byte(8) == pytest.approx(3)


# --- bigrams -------------------------------------------------------------------------------------------------------


def blocks_of(*documents: list[int]) -> PackedBlocks:
    return PackedBlocks(documents, sum(map(len, documents)))


def test_a_deterministic_text_is_predicted_by_its_bigrams() -> None:
    train = [blocks_of([0, 1, 2, 3] * 50)[0]]
    assert bigram_perplexity(train, train, 4).perplexity == pytest.approx(1, abs=1e-3)


def test_tokens_without_structure_cost_their_entropy() -> None:
    rng = np.random.default_rng(0)
    train = [blocks_of(rng.integers(0, 8, 20_000).tolist())[0]]
    held_out = [blocks_of(rng.integers(0, 8, 20_000).tolist())[0]]
    assert bigram_perplexity(train, held_out, 8).perplexity == pytest.approx(8, rel=0.01)


def test_an_unseen_token_costs_no_more_than_the_uniform_share_of_the_mixture() -> None:
    train, held_out = [blocks_of([0, 1] * 20)[0]], [blocks_of([0, 1] * 10 + [5, 0])[0]]
    assert 1 < bigram_perplexity(train, held_out, 6).perplexity < 6


def test_pairs_across_documents_are_not_counted() -> None:
    train = [blocks_of([0, 1], [2, 3])[0]]
    held_out = [blocks_of([0, 1], [2, 3])[0]]
    found = bigram_perplexity(train, held_out, 4)
    assert found.tokens == 2
