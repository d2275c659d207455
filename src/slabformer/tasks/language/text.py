"""What a run reads: tokenizer, training blocks and held-out blocks, from one corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from slabformer.tasks.language.config import TrainConfig
from slabformer.tasks.language.corpus import Corpus, sha256_of, split_documents
from slabformer.tasks.language.packing import BlockStream, PackedBlocks
from slabformer.tasks.language.tokens import check_vocabulary, encode, load_tokenizer, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """Blocks to train on, held-out ones, and where they come from."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedBlocks | BlockStream
    held_out: PackedBlocks
    record: dict[str, object]
    """For the run's summary: path, digest of the text (of a stream, of its held-out documents), sizes."""


def read_text(config: TrainConfig, checkpoint: Path | None = None) -> TrainingText:
    """Read, split, tokenize and pack the text of ``config``.

    Args:
        config: Of the run.
        checkpoint: Where the run goes on: its tokenizer is taken instead of training one anew.

    Raises:
        ValueError: If there is no text or too little, or the tokenizer does not fit the model.
        FileNotFoundError: If there is no such file.
    """
    corpus, context = Corpus(config.data), config.model.context
    if config.data.stream:
        held_out = list(corpus.held_out())
        tokenizer = _tokenizer(config, corpus.training(config.seed), checkpoint)
        train: PackedBlocks | BlockStream = BlockStream(partial(_stream, corpus, tokenizer, config.seed), context)
        record: dict[str, object] = {"held_out_sha256": sha256_of(held_out)}
    else:
        documents = list(corpus)
        training, held_out = split_documents(config.data, documents)
        tokenizer = _tokenizer(config, training, checkpoint)
        train = PackedBlocks(encode(tokenizer, training), context)
        record = {"sha256": sha256_of(documents), "documents": len(documents), "train_tokens": train.num_tokens}
    if not held_out:
        raise ValueError(f"{config.data.path} holds no text to hold out")
    blocks = PackedBlocks(encode(tokenizer, held_out), context, keep_rest=True)
    record |= {"held_out_documents": len(held_out), "held_out_tokens": blocks.num_tokens}
    return TrainingText(tokenizer=tokenizer, train=train, held_out=blocks, record={"path": config.data.path, **record})


def _tokenizer(
    config: TrainConfig, documents: Iterator[str] | Sequence[str], checkpoint: Path | None
) -> PreTrainedTokenizerBase:
    given = config.tokenizer.path or checkpoint
    if given is None:
        tokenizer = train_tokenizer(documents, config.tokenizer, config.model.context)
    else:
        tokenizer = load_tokenizer(given)
    check_vocabulary(tokenizer, config.model.vocab_size or len(tokenizer))
    return tokenizer


def _stream(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seed: int, epoch: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    return encode(tokenizer, corpus.training(seed, epoch, rank, world_size))
