"""From an image to the model's input: timm's transforms, drawn from (seed, epoch, index) and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from slabformer._extras import require
from slabformer.tasks.classification.config import AugmentConfig, DataConfig
from slabformer.tasks.engine.order import Stream

Transform = Callable[[Image.Image], Tensor]


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
