"""Several ranks that run one model over their own batches and meet at every norm."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slabformer.nn.prepbn import PRepBN
from slabformer.ops.precision import wide_device

#: what a rank without a batch gets, while others have one
NO_MORE = object()
_DONE, _FAILED = -1, -2


class OtherRankError(RuntimeError):
    """What another rank did ends the work of this one."""


class Ranks:
    """The ranks that :func:`slabformer.sync_norms_` named; without it, this one alone.

    A rank that has run out of batches, or had none, follows the others from norm to norm, so that all of them hold the
    same sums at every moment.

    Args:
        norms: By name, in one order on all ranks.
        longest_row: Most numbers that a norm's row has.
    """

    def __init__(self, norms: Mapping[str, PRepBN], longest_row: int) -> None:
        first = next(iter(norms.values())).rep
        self._names = list(norms)
        self._group = first.sync.group if first.sync is not None else None
        self._several = first.sync is not None and first.sync.active
        self._device = wide_device(first.running_mean.device)
        self._longest_row = longest_row

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """``batches``, and NO_MORE for as long as another rank has one."""
        for batch in itertools.chain(batches, itertools.repeat(NO_MORE)):
            if not self._any(batch is not NO_MORE):
                return
            yield batch

    def _any(self, here: bool) -> bool:
        if not self._several:
            return here
        flag = torch.tensor(here, dtype=torch.int32, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def gather(self, name: str, row: Tensor) -> list[Tensor]:
        """The rows of all ranks that are at the norm ``name``."""
        if not self._several:
            return [row]
        found = self._exchange(self._names.index(name), row)
        assert found is not None
        return found[1]

    def follow(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Norms that other ranks come to, with their rows, until all are done with their batch."""
        while self._several and (found := self._exchange(_DONE)) is not None:
            yield found

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Tell the other ranks of an error inside the block, so that none waits for this one."""
        try:
            yield
        except BaseException as error:
            if self._several and not isinstance(error, OtherRankError):
                self._exchange(_FAILED)
            raise

    def _exchange(self, place: int, row: Tensor | None = None) -> tuple[str, list[Tensor]] | None:
        """Name of the norm that ranks are at and their rows; None where all are done."""
        mine = torch.zeros(2 + self._longest_row, dtype=torch.float64, device=self._device)
        mine[0] = place
        if row is not None:
            mine[1] = len(row)
            mine[2 : 2 + len(row)] = row
        given = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(given, mine, group=self._group)
        places = [int(each[0]) for each in given]
        if _FAILED in places and place != _FAILED:
            raise OtherRankError(f"rank {places.index(_FAILED)} failed in the fit; see what it says")
        at = {each for each in places if each >= 0}
        if len(at) > 1:
            names = " and ".join(self._names[each] for each in sorted(at))
            raise OtherRankError(f"ranks run {names} at the same time; give all of them the same model")
        if not at:
            return None
        return self._names[at.pop()], [each[2 : 2 + int(each[1])] for each in given if each[1]]
