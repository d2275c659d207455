"""Documents in blocks of one length, none attending to another.

Documents follow each other without gaps and blocks are cut every ``context`` tokens, so that no padding reaches the
statistics of a norm. Positions restart at 0 with every document and every block; from that transformers masks attention
across documents, **if no cache is used**: with ``use_cache=True``, its default, it takes them for one text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

Block = dict[str, Tensor]
#: label of what is not to be predicted
IGNORED = -100


class PackedBlocks(Dataset[Block]):
    """Blocks in memory.

    Args:
        documents: Token ids of each.
        context: Tokens of a block.
        keep_rest: Keep the last block, which is shorter. Training leaves it out.

    Raises:
        ValueError: If the documents do not fill a block.
    """

    def __init__(self, documents: Iterable[Sequence[int]], context: int, keep_rest: bool = False) -> None:
        whole = [np.asarray(ids, dtype=np.int32) for ids in documents]
        ids = np.concatenate([np.zeros(0, np.int32), *whole])
        starts = np.concatenate([np.zeros(0, bool), *(_first(len(ids)) for ids in whole)])
        self.context, self.num_tokens = context, len(ids)
        self._ids, self._starts = ids, starts
        self._length = -(-len(ids) // context) if keep_rest else len(ids) // context
        if not self._length:
            raise ValueError(f"the training text has {len(ids)} tokens, fewer than one block of {context}; give more")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Block]:
        return map(self.__getitem__, range(self._length))

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        part = slice(index * self.context, (index + 1) * self.context)
        return block_of(self._ids[part], self._starts[part])


#: an epoch's documents as token ids, of one process of several: ``(epoch, rank, world_size)``
Documents = Callable[[int, int, int], Iterable[Sequence[int]]]


class BlockStream(IterableDataset[Block]):
    """Blocks made from documents as they come, epoch after epoch without an end.

    No epoch ends by itself, since the processes' shares are of different lengths and none may wait for the others.

    Args:
        documents: Gives the documents of one process in one epoch.
        context: Tokens of a block.
        rank: Of this process.
        world_size: How many there are.

    Raises:
        ValueError: Out of iterating, if an epoch has no document for this process.
    """

    def __init__(self, documents: Documents, context: int, rank: int = 0, world_size: int = 1) -> None:
        self.documents, self.context, self.rank, self.world_size = documents, context, rank, world_size

    def share(self, rank: int, world_size: int) -> BlockStream:
        """The same for one process of several."""
        return BlockStream(self.documents, self.context, rank, world_size)

    def __iter__(self) -> Iterator[Block]:
        ids, starts = np.zeros(0, np.int32), np.zeros(0, bool)
        for document in self._endless():
            ids = np.concatenate([ids, np.asarray(document, dtype=np.int32)])
            starts = np.concatenate([starts, _first(len(document))])
            while len(ids) >= self.context:
                yield block_of(ids[: self.context], starts[: self.context])
                ids, starts = ids[self.context :], starts[self.context :]

    def _endless(self) -> Iterator[Sequence[int]]:
        for epoch in itertools.count():
            found = False
            for document in self.documents(epoch, self.rank, self.world_size):
                found = True
                yield document
            if not found:
                raise ValueError(
                    f"the stream has no document left to train on for process {self.rank} of {self.world_size}; "
                    "give more text, or hold out less with data.validation"
                )


def block_of(ids: np.ndarray, starts: np.ndarray) -> Block:
    """Tokens, positions that restart where a document does, and labels.

    The first token of each piece has no label: nothing of its document stands before it.
    """
    index = np.arange(len(ids))
    positions = index - np.maximum.accumulate(np.where(starts, index, 0))
    tokens = torch.from_numpy(ids.astype(np.int64))
    place = torch.from_numpy(positions)
    return {"input_ids": tokens, "position_ids": place, "labels": tokens.masked_fill(place == 0, IGNORED)}


def collate(blocks: Sequence[Block]) -> Block:
    """Blocks of one length as a batch ``(B, N)``."""
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def batches_of(blocks: Iterable[Block], batch_size: int) -> Iterator[Block]:
    """Batches in order, of ``batch_size`` blocks of one length; a shorter block starts another batch."""
    waiting: list[Block] = []
    for block in blocks:
        if waiting and (len(waiting) == batch_size or len(block["input_ids"]) != len(waiting[0]["input_ids"])):
            yield collate(waiting)
            waiting = []
        waiting.append(block)
    if waiting:
        yield collate(waiting)


def _first(length: int) -> np.ndarray:
    starts = np.zeros(length, dtype=bool)
    starts[:1] = True
    return starts
