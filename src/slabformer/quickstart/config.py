"""What the main job is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from slabformer.settings import Epochs, NonEmptyStr, Seconds, Seed, Settings, Threads


@dataclass(kw_only=True)
class QuickstartConfig(Settings):
    """What the main job does; the defaults take about three minutes on two CPU cores."""

    output: NonEmptyStr = "runs/quickstart"
    """Folder that everything is written to; what an earlier quickstart left there is replaced."""
    epochs: Epochs = 40
    """Passes over the 1,437 training images, for either model."""
    seed: Seed = 0
    """Of weights, order and augmentation."""
    bench_seconds: Seconds = 2.0
    """Length of the measurement at each batch size."""
    compiled: bool = True
    """Also measure under `torch.compile`, at the larger batch size."""
    threads: Threads = 1
    """torch's threads on a CPU. Operations this small gain nothing from a second one, and lose twenty times their speed
    where another process wants the same core."""
