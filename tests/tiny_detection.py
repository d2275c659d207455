"""A detector's training run of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coco_files import write_root
from detectors import SMALL_SWIN, small_config
from slabformer.tasks.detection.config import (
    DecayConfig,
    DetectionAugment,
    DetectionData,
    ModelConfig,
    RateConfig,
    TrainConfig,
)
from slabformer.tasks.engine.config import FadeConfig

#: what is trained here, beside its drop path
TINY_BACKBONE = dict(SMALL_SWIN)
#: for runs of one epoch
NO_STEPS = RateConfig(name="cosine", warmup_steps=0)


def tiny_config(output: Path, **changes: Any) -> TrainConfig:
    """All that draws random numbers or holds state is on: flips, sizes, crops, drop path, accumulation, fading."""
    root = output.parent / "coco"
    if not root.exists():
        write_root(root)  # 6 images in two groups of 3: 4 batches of 2, windows of 3 and 1
    settings: dict[str, Any] = {
        "model": ModelConfig(args={**TINY_BACKBONE, "drop_path_rate": 0.2}),
        "detector": small_config(),
        "data": DetectionData(path=str(root)),
        "augment": DetectionAugment(size=48, max_size=64, sizes=(40, 48), crop_sizes=(48, 56), crop_range=(32, 48)),
        "optimizer": DecayConfig(lr=1e-3),
        "lr_schedule": RateConfig(milestones=[2], warmup_steps=2),
        "gamma": FadeConfig(warmup=0.1, fade=0.5),
        "epochs": 3,
        "batch_size": 2,
        "accumulate": 3,
        "output": str(output),
        "device": "cpu",
        "log_every": 1,
        "eval_every": 1,
        "tensorboard": False,
    }
    return TrainConfig(**{**settings, **changes})
