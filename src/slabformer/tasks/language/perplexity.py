"""Perplexity: the exponential of the mean negative log-likelihood of a token, each token counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.ops.precision import wide, wide_device
from slabformer.surgery.batches import eval_mode
from slabformer.tasks.language.packing import IGNORED, Block


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted.

    Attributes:
        nll: Sum over the tokens of their negative log-likelihood, nats.
        tokens: How many were predicted.
    """

    nll: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of :attr:`loss`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits for each byte of the text, which compares models with different tokenizers."""
        return self.nll / math.log(2) / num_bytes

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"perplexity": self.perplexity, "loss": self.loss, **asdict(self)}


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Block], progress: Callable[[], None] = lambda: None) -> Perplexity:
    """Of a causal language model over ``batches`` of ``input_ids`` and ``labels``, with ``position_ids`` where packed.

    Token ``t`` is predicted from those before it; tokens whose label is -100 count nothing. The model runs in eval mode
    and without a cache; modes are restored.

    Raises:
        ValueError: If there is nothing to predict.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=wide_device(torch.device(device)))
    count = torch.zeros((), dtype=torch.int64, device=device)
    with eval_mode(model):
        for batch in batches:
            moved = {name: value.to(device) for name, value in batch.items()}
            labels = moved.pop("labels")[:, 1:]
            total += wide(nll_of(model(**moved, use_cache=False).logits[:, :-1], labels)).sum()
            count += (labels != IGNORED).sum()
            progress()
    if not count:
        raise ValueError("there is no token to predict; give a longer text")
    return Perplexity(float(total), int(count))


def nll_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label ``(B, N)`` under logits ``(B, N, V)``; 0 where the label is -100."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)


def windows(documents: Iterable[Sequence[int]], context: int, stride: int) -> Iterator[Block]:
    """Overlapping pieces of each document; every token but a document's first is predicted once.

    Args:
        documents: Token ids of each.
        context: Longest piece.
        stride: Tokens from one piece to the next: tokens after the first piece see at least ``context - stride``
            tokens before them.

    Raises:
        ValueError: If ``stride`` is not in [1, context - 1].
    """
    if not 1 <= stride < context:
        raise ValueError(f"stride must be in [1, {context - 1}], below the context, got {stride}")
    for document in documents:
        ids = torch.tensor(document)
        done = 1  # nothing stands before the first token
        for start in range(0, len(ids), stride):
            piece = ids[start : start + context]
            labels = piece.clone()
            labels[: done - start] = IGNORED
            if done < len(ids):
                yield {"input_ids": piece, "labels": labels}
            done = max(done, start + len(piece))
            if done >= len(ids):
                break
