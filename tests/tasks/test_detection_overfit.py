"""Detectors learn: a few images by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detectors import objects, pictures, small_detector
from slabformer.progressive import ProgressiveSchedule
from slabformer.tasks.detection.config import (
    SMALL_BACKBONE,
    DecayConfig,
    DetectionAugment,
    DetectionData,
    ModelConfig,
    RateConfig,
    TrainConfig,
)
from slabformer.tasks.detection.digits import LAYOUT, write_digits
from slabformer.tasks.detection.train import train
from slabformer.tasks.engine.config import FadeConfig


def test_every_part_of_the_loss_falls_on_two_images_while_layernorm_fades() -> None:
    torch.manual_seed(0)
    detector = small_detector()
    images, targets = pictures((64, 64), (64, 64)), [objects(3, (64, 64), seed) for seed in range(2)]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    schedule = ProgressiveSchedule(detector, total_steps=45, fade=0.5)
    history = []
    for _ in range(45):
        losses = detector(images, targets)
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
        schedule.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    assert schedule.finished
    for name in ("loss_objectness", "loss_classifier", "loss_mask"):
        first, last = (sum(row[name] for row in rows) for rows in (history[:5], history[-5:]))
        assert last < 0.7 * first, name


@pytest.mark.slow
def test_sixteen_images_are_learnt_by_heart(tmp_path: Path) -> None:
    """As measured once elsewhere: AP50 85 after 40 steps; one seed, hence the margin."""
    write_digits(tmp_path / "digits", num_train=16, num_validation=1)
    images, annotations = (str(tmp_path / "digits" / part) for part in LAYOUT["train"])
    result = train(
        TrainConfig(
            model=ModelConfig(args={**SMALL_BACKBONE, "img_size": 96, "window_size": 6}),
            data=DetectionData(path=str(tmp_path / "digits"), val_images=images, val_annotations=annotations),
            augment=DetectionAugment(policy="none", size=96, max_size=96),
            optimizer=DecayConfig(lr=2e-3),
            lr_schedule=RateConfig(name="cosine", warmup_steps=10),
            gamma=FadeConfig(fade=0.7),
            epochs=30,
            eval_every=30,
            output=str(tmp_path / "run"),
            device="cpu",
            tensorboard=False,
        )
    )
    assert result.metrics["box_ap50"] > 50
