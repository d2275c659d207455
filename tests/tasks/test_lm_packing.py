"""Tokens in blocks: nothing lost, nothing seen across documents."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from language_models import SIZES, sentences, tokens, trained_looking
from slabformer.tasks.language.packing import IGNORED, BlockStream, PackedBlocks, batches_of, block_of
from slabformer.tasks.language.tokens import (
    TokenizerConfig,
    check_vocabulary,
    encode,
    load_tokenizer,
    train_tokenizer,
)
from tolerances import EXACT, FLOAT32, assert_close

DOCUMENTS = [list(range(10, 15)), list(range(20, 23)), list(range(30, 49))]
CONTEXT = 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(sentences(200), TokenizerConfig(vocab_size=300), CONTEXT)


@pytest.mark.parametrize("keep_rest", [False, True], ids=["blocks", "with-rest"])
def test_blocks_hold_the_documents_in_order(keep_rest: bool) -> None:
    blocks = PackedBlocks(DOCUMENTS, CONTEXT, keep_rest)
    together = torch.cat([blocks[index]["input_ids"] for index in range(len(blocks))])
    flat = torch.tensor([token for document in DOCUMENTS for token in document])
    assert_close(together, flat[: len(flat) if keep_rest else len(flat) // CONTEXT * CONTEXT], EXACT)


def test_positions_restart_with_documents_and_blocks_and_first_tokens_have_no_label() -> None:
    block = PackedBlocks(DOCUMENTS, CONTEXT)[0]
    assert block["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert block["labels"].tolist() == [IGNORED, 11, 12, 13, 14, IGNORED, 21, 22]
    # a document longer than the context goes on in the next block, as a piece of its own
    assert PackedBlocks(DOCUMENTS, CONTEXT)[2]["position_ids"].tolist() == list(range(CONTEXT))


def test_a_stream_gives_the_blocks_that_memory_does() -> None:
    blocks, stream = PackedBlocks(DOCUMENTS, CONTEXT), BlockStream(lambda *share: DOCUMENTS, CONTEXT)
    for index, block in enumerate(islice(stream, len(blocks))):
        for name, value in blocks[index].items():
            assert_close(block[name], value, EXACT)


def test_a_stream_goes_on_with_the_next_epoch() -> None:
    stream = BlockStream(lambda epoch, rank, world_size: [[epoch, rank, world_size]], 3).share(1, 2)
    assert [block["input_ids"].tolist() for block in islice(stream, 3)] == [[0, 1, 2], [1, 1, 2], [2, 1, 2]]


def test_a_stream_without_documents_for_a_process_is_told() -> None:
    with pytest.raises(ValueError, match="no document left to train on for process 3 of 4"):
        next(iter(BlockStream(lambda *share: [], CONTEXT, 3, 4)))


def test_batches_keep_the_order_and_shorter_blocks_apart() -> None:
    batches = list(batches_of(PackedBlocks(DOCUMENTS, CONTEXT, keep_rest=True), 2))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8), (1, 8), (1, 3)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
def test_packed_documents_do_not_attend_to_each_other(attention: str, ours: bool) -> None:
    model = trained_looking() if ours else LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES)).eval()
    model.set_attn_implementation(attention)
    ids = tokens(1, 12)
    starts = np.zeros(12, dtype=bool)
    starts[[0, 5]] = True
    positions = block_of(ids[0].numpy(), starts)["position_ids"][None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for first, last in pairwise([0, 5, 12]):
            alone = model(input_ids=ids[:, first:last], use_cache=False).logits
            assert_close(packed[:, first:last], alone, FLOAT32)


def test_too_little_text_for_a_block_is_told() -> None:
    with pytest.raises(ValueError, match="has 3 tokens, fewer than one block of 8"):
        PackedBlocks([[1, 2, 3]], CONTEXT)
    with pytest.raises(ValueError, match="has 0 tokens"):
        PackedBlocks([], CONTEXT)


# --- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the norm fades", "  two\n\n\tspaces ", "\u00e9\u4e2d\U0001f600", "</s"])
def test_every_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (ids,) = encode(tokenizer, [text])
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[1:-1]) == text


def test_a_prompt_starts_like_a_document_and_frequent_letters_share_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" the layer")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) <= 1 + len(" the layer") // 2


def test_a_folder_restores_the_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a layer of text")["input_ids"] == tokenizer("a layer of text")["input_ids"]


def test_tokens_outside_the_vocabulary_are_told(tokenizer: PreTrainedTokenizerFast) -> None:
    check_vocabulary(tokenizer, 300)
    largest = max(tokenizer.get_vocab().values())
    with pytest.raises(
        ValueError, match=rf"tokens up to {largest}, the model a vocabulary of {largest}; .* {largest + 1}"
    ):
        check_vocabulary(tokenizer, largest)


def test_a_folder_without_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258, got 100"):
        TokenizerConfig(vocab_size=100)
