"""Which ranks share the statistics of a norm."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class StatisticsSync:
    """A process group that modules may hold: copies of a module share it, since groups cannot be copied.

    Saved, only the default group survives: another one must be given again before several ranks train.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._is_lost = False

    @property
    def active(self) -> bool:
        """Whether there is more than one rank to share with.

        Raises:
            RuntimeError: If there may be, but the group was lost in saving.
        """
        if self._is_lost and dist.is_available() and dist.is_initialized():
            raise RuntimeError(
                "the norms shared statistics in a process group, which a saved model cannot hold; "
                "call sync_norms_(model, process_group=...) again"
            )
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> StatisticsSync:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"group": None, "_is_lost": self._is_lost or self.group is not None}
