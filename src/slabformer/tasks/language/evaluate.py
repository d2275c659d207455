"""Perplexity of a text as documents, by a sliding window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slabformer.tasks.language.corpus import Corpus, DataConfig, Unit
from slabformer.tasks.language.packing import batches_of
from slabformer.tasks.language.perplexity import Perplexity, perplexity, windows
from slabformer.tasks.language.tokens import encode


def read_documents(
    path: str,
    *,
    document: Unit = "file",
    split: str = "test",
    text_field: str = "text",
    max_documents: int | None = None,
) -> list[str]:
    """Documents of a text, as :class:`Corpus` reads them.

    Raises:
        ValueError: If there is no text.
        FileNotFoundError: If there is no such file.
    """
    corpus = Corpus(DataConfig(path=path, document=document, split=split, text_field=text_field))
    documents = list(islice(corpus, max_documents))
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def sliding_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Perplexity of ``model`` on ``documents``, each token predicted once, from up to a context of tokens before it.

    Args:
        model: A causal language model.
        tokenizer: Its own.
        documents: Texts; the marks of their start and end are tokens too.
        stride: Tokens from one window to the next; half the context by default.
        batch_size: Windows at once.
        progress: Called after each document.

    Returns:
        ``perplexity`` and ``loss`` (nats a token), ``bits_per_byte``, ``nll`` (sum), ``tokens``.

    Raises:
        ValueError: If ``stride`` is not below the context.
    """
    context = model.config.max_position_embeddings
    total, tokens = 0.0, 0
    for document in encode(tokenizer, documents):
        pieces = windows([document], context, stride or max(1, context // 2))
        found = perplexity(model, batches_of(pieces, batch_size))
        total, tokens = total + found.nll, tokens + found.tokens
        progress()
    result = Perplexity(total, tokens)
    num_bytes = sum(len(text.encode()) for text in documents)
    return {**result.to_dict(), "bits_per_byte": result.bits_per_byte(num_bytes)}
