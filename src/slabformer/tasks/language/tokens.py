"""Tokenizers: one that is given, or a byte-level BPE trained on the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slabformer.tasks.language.config import TokenizerConfig

logger = logging.getLogger(__name__)

#: one of them lies in every folder that holds a tokenizer
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
BOS, EOS = "<s>", "</s>"
#: documents tokenized at once
BATCH = 256


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Raises:
        ValueError: If there is none, or it marks no end of text.
    """
    if Path(path).is_dir() and not _holds_tokenizer(Path(path)):
        raise ValueError(
            f"no tokenizer at {str(path)!r}: none of {', '.join(FILES)} is there; copy one beside the model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no tokenizer at {str(path)!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {str(path)!r} marks no end of text (eos_token); give another")
    return tokenizer


def tokenizer_beside(model: str | Path, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's folder or hub name, or None, with a warning, where a folder holds none.

    Raises:
        ValueError: If it cannot be read, or has tokens outside of ``vocab_size``.
    """
    if Path(model).is_dir() and not _holds_tokenizer(Path(model)):
        logger.warning("%s holds no tokenizer; copy one beside the weights to generate or evaluate", model)
        return None
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig, context: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE over ``documents``: every text has tokens, and comes back from them unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents, config.documents), trainer)
    # a prompt starts like a document
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each document, between the marks of its start (where the tokenizer has one) and its end."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*before, *ids, tokenizer.eos_token_id]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        ValueError: If the tokenizer's largest token is outside ``vocab_size``.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has tokens up to {largest}, the model a vocabulary of {vocab_size}; "
            f"give the model's own tokenizer, or model.args.vocab_size of at least {largest + 1}"
        )


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)
