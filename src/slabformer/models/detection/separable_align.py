"""RoIAlign as matrix products: the same sums, and on small maps on a CPU a backward of a fraction of the time."""

from __future__ import annotations

import torch
from torch import Tensor

#: cells of a map up to which products with all of its rows beat torchvision's backward, which no vector unit runs
MOST_CELLS = 64 * 64


def is_cheaper(features: Tensor, sampling_ratio: int) -> bool:
    """Whether :func:`separable_roi_align` is the faster one: in training, on a CPU, on a small map."""
    small = features.shape[2] * features.shape[3] <= MOST_CELLS
    return features.requires_grad and features.device.type == "cpu" and small and sampling_ratio > 0


def separable_roi_align(features: Tensor, rois: Tensor, side: int, scale: float, sampling_ratio: int) -> Tensor:
    """``torchvision.ops.roi_align`` with ``aligned=True``: a bin's mean of bilinear samples is a row times a column.

    Args:
        features: Maps ``(B, C, h, w)``.
        rois: Image and box of each, ``(n, 5)``, images ascending; no gradient goes to them.
        side: Bins on either axis.
        scale: Cells to a pixel.
        sampling_ratio: Samples to a bin on either axis, at least 1.

    Shape:
        ``(n, C, side, side)``.
    """
    C, h, w = features.shape[1:]
    corners = rois[:, 1:].detach() * scale - 0.5
    rows = _weights(corners[:, 1], corners[:, 3], h, side, sampling_ratio).to(features.dtype)  # (n, side, h)
    columns = _weights(corners[:, 0], corners[:, 2], w, side, sampling_ratio).to(features.dtype)
    counts = rois[:, 0].long().bincount(minlength=len(features)).tolist()
    pooled = []
    for image, own_rows, own_columns in zip(features, rows.split(counts), columns.split(counts), strict=True):
        across = own_rows.flatten(0, 1) @ image.transpose(0, 1).flatten(1)  # (n side, C w)
        bins = across.view(-1, side * C, w) @ own_columns.mT
        pooled.append(bins.view(-1, side, C, side).transpose(1, 2))
    return torch.cat(pooled)


def _weights(start: Tensor, end: Tensor, size: int, side: int, sampling_ratio: int) -> Tensor:
    """What each cell of an axis adds to each bin, ``(n, side, size)``; samples beyond the map's border add nothing."""
    steps = (torch.arange(side * sampling_ratio).to(start) + 0.5) / (side * sampling_ratio)
    samples = start[:, None] + (end - start)[:, None] * steps
    inside = (samples >= -1) & (samples <= size)
    distance = samples.clamp(0, size - 1)[..., None] - torch.arange(size).to(start)
    shares = (1 - distance.abs()).clamp(min=0) * inside[..., None]
    return shares.unflatten(1, (side, sampling_ratio)).mean(2)
