"""From an image to the model's input: timm's transforms, drawn from (seed, epoch, index) and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from slabformer._extras import require
from slabformer.settings import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Settings,
    Where,
)
from slabformer.tasks.classification.sources import DataConfig
from slabformer.tasks.engine.order import Stream

Transform = Callable[[Image.Image], Tensor]


#: of a policy's name, behind its first word: a letter or word with its number, or a set of RandAugment's transforms
SECTION = re.compile(r"[a-su-z][a-z]*\d+(\.\d+)?|t[a-z\d]*")


def _is_policy(name: str) -> bool:
    """Whether timm reads the whole name: it skips a section without a number, and asserts that it knows the others."""
    if not all(map(SECTION.fullmatch, name.split("-")[1:])):
        return False
    policies = require("timm.data.auto_augment", extra="vision")
    makers = {"rand": policies.rand_augment_transform, "augmix": policies.augment_and_mix_transform}
    make = next((make for prefix, make in makers.items() if name.startswith(prefix)), policies.auto_augment_transform)
    try:
        return bool(make(name, {"translate_const": 100, "img_mean": (124, 116, 104)}))
    except (AssertionError, ValueError, LookupError):
        return False


Policy = Annotated[
    str, Where("a policy of timm's, such as rand-m9-mstd0.5-inc1, augmix-m5-w4, original or v0", _is_policy)
]


@dataclass(kw_only=True)
class AugmentConfig(Settings):
    """What training images go through. Defaults are the published ImageNet recipe."""

    policy: Literal["timm", "light", "none"] = "timm"
    """`timm`: random resized crop, flips and what the fields below say. `light`: small shifts and turns of images
    held in memory, whole batches at once (for `digits`). `none`: as for validation."""
    scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    """Share of the image's area that a random crop keeps (`timm`)."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Aspect ratio of a random crop (`timm`)."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip (`timm`)."""
    vflip: Fraction = 0.0
    """Probability of a vertical flip (`timm`)."""
    auto_augment: Policy | None = "rand-m9-mstd0.5-inc1"
    """timm's name of an automatic policy (`timm`)."""
    color_jitter: NonNegativeFloat = 0.4
    """Strength of brightness, contrast, saturation jitter (`timm`); without effect under RandAugment, as published."""
    re_prob: Fraction = 0.25
    """Probability of random erasing (`timm`)."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What erases: zeros, one random colour, or random pixels (`timm`)."""
    re_count: PositiveInt = 1
    """Most regions erased in one image (`timm`)."""
    light_shift: Fraction = 0.08
    """Largest shift as a share of height and width (`light`)."""
    light_rotate: Annotated[float, Range(ge=0, le=180)] = 10.0
    """Largest turn in degrees (`light`)."""
    light_scale: FractionBelowOne = 0.1
    """Largest relative change of size (`light`)."""
    mixup: NonNegativeFloat = 0.8
    """Mixup alpha, 0 for none; applied by the trainer."""
    cutmix: NonNegativeFloat = 1.0
    """CutMix alpha, 0 for none; applied by the trainer."""
    mixup_prob: Fraction = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: Fraction = 0.5
    """Probability of CutMix where both are on."""
    label_smoothing: FractionBelowOne = 0.1
    """Share of the target spread over all classes."""


def train_transform(data: DataConfig, augment: AugmentConfig) -> Transform:
    """timm's training transform: PIL image to normalised float32 ``(3, H, W)``."""
    if augment.policy == "none":
        return eval_transform(data)
    return _create_transform(
        data,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        auto_augment=augment.auto_augment,
        color_jitter=augment.color_jitter,
        re_prob=augment.re_prob,
        re_mode=augment.re_mode,
        re_count=augment.re_count,
    )


def eval_transform(data: DataConfig, *, normalize: bool = True) -> Transform:
    """timm's validation transform: resize, centre crop, normalise; uint8 ``(3, H, W)`` without ``normalize``."""
    return _create_transform(data, is_training=False, crop_pct=data.crop_pct, normalize=normalize)


def _create_transform(data: DataConfig, **options: Any) -> Transform:
    transform = require("timm.data", extra="vision").create_transform(
        input_size=(3, data.image_size, data.image_size),
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
        **options,
    )
    for policy in transform.transforms:
        for operation in getattr(policy, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep at least one bit: the strongest draws ask for none, which was all black and which Pillow 13 refuses."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def light_draws(seed: int, epoch: int, count: int) -> Tensor:
    """Uniform numbers in [-1, 1) for :func:`light_augment`, ``(count, 4)``: row ``i`` belongs to image ``i``."""
    draws = np.random.default_rng((Stream.LIGHT, seed, epoch)).random((count, 4), dtype=np.float32)
    return torch.from_numpy(draws * 2 - 1)


def light_augment(images: Tensor, draws: Tensor, augment: AugmentConfig) -> Tensor:
    """Shift, turn and scale every image a little, all at once; what comes in from outside is 0.

    Args:
        images: ``(B, C, H, W)``, 0 where nothing is.
        draws: ``(B, 4)`` in [-1, 1]: turn, size, shift along x and y.
        augment: Its ``light_*`` fields.

    Returns:
        ``(B, C, H, W)``.
    """
    height, width = images.shape[-2:]
    angle = draws[:, 0] * math.radians(augment.light_rotate)
    size = 1 + draws[:, 1] * augment.light_scale
    cos, sin = (angle.cos() / size)[:, None], (angle.sin() / size)[:, None]
    shift = draws[:, 2:] * augment.light_shift * 2  # coordinates run from -1 to 1
    x, y = _centres(width), _centres(height)
    # outer sums by hand: several times as fast as F.affine_grid, and no sum depends on the batch's other images
    from_x = (cos * x + shift[:, :1])[:, None, :] - (sin * y * (height / width))[:, :, None]
    from_y = (sin * x * (width / height))[:, None, :] + (cos * y + shift[:, 1:])[:, :, None]
    grid = torch.stack([from_x, from_y], dim=-1)  # (B, H, W, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _centres(size: int) -> Tensor:
    """Coordinates of ``size`` pixels between the borders at -1 and 1."""
    return (torch.arange(size) * 2 + 1) / size - 1
