"""Mean loss and speed of an epoch, without waiting for the device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class EpochMeter:
    """Sums the losses of an epoch on the device; survives a resume in the middle of it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._timed_samples, self._started = 0, time.perf_counter()

    def reset(self) -> None:
        """A new epoch begins."""
        self._sums.zero_()

    def restart_clock(self) -> None:
        """Speed is measured from here on."""
        self._timed_samples, self._started = 0, time.perf_counter()

    def add(self, loss: Tensor, samples: int, samples_of_all_ranks: int) -> None:
        """Take in the mean ``loss`` over ``samples``."""
        self._sums[0] += loss.detach() * samples
        self._sums[1] += samples
        self._timed_samples += samples_of_all_ranks

    def samples_per_second(self) -> float:
        """Speed over all ranks since the clock was started."""
        return self._timed_samples / max(time.perf_counter() - self._started, 1e-9)

    def mean_loss(self, accelerator: Accelerator) -> float:
        """Mean over the epoch's samples of all ranks so far; waits for the device."""
        total, samples = accelerator.reduce(self._sums.clone(), "sum").tolist()
        return total / max(samples, 1)

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """The sums over all ranks."""
        return {"sums": accelerator.reduce(self._sums.clone(), "sum").cpu()}

    def load_state_dict(self, state: dict[str, Any], accelerator: Accelerator) -> None:
        """Rank 0 goes on from the sums of all, the others from nothing."""
        self._sums.zero_()
        if accelerator.is_main_process:
            self._sums.copy_(state["sums"])
