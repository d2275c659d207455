"""Which ranks share the statistics of a norm."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class StatisticsSync:
    """A process group that modules may hold: copies of a module share it, since groups cannot be copied."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def active(self) -> bool:
        """Whether there is more than one rank to share with."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> StatisticsSync:
        return self

    def __reduce__(self) -> tuple[type[StatisticsSync], tuple[()]]:
        return StatisticsSync, ()
