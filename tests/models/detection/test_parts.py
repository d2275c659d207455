"""The small parts of a detector, each against a known value or a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList

from slabformer.models.detection.anchors import PyramidAnchors
from slabformer.models.detection.coding import ClampedBoxCoder
from slabformer.models.detection.matching import MaxIoUMatcher
from slabformer.models.detection.pooling import PyramidRoIAlign
from tolerances import EXACT, FLOAT32, assert_close

STRIDES = (4, 8, 16, 32, 64)


def grids(height: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Maps of every level; the last is every other cell of the fourth."""
    sizes = [(height // s, width // s) for s in STRIDES[:4]]
    sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
    return [torch.zeros(1, 1, *size, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_anchors_lie_at_multiples_of_their_stride_and_are_not_rounded(dtype):
    maps = grids(800, 1344, dtype)
    anchors = PyramidAnchors(STRIDES, 8.0, (0.5, 1.0, 2.0))(
        ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1333)]), maps
    )
    (anchors,) = anchors
    assert anchors.dtype == torch.float32
    assert len(anchors) == 3 * sum(x[0].numel() for x in maps)
    top = anchors[-3 * 13 * 21 :].view(13, 21, 3, 4)  # 13 rows at 64 pixels, not at 800 // 13 = 61
    centres = (top[..., :2] + top[..., 2:]) / 2
    assert_close(centres[:, 0, 1, 1], 64.0 * torch.arange(13), EXACT)
    assert_close(centres[0, :, 1, 0], 64.0 * torch.arange(21), EXACT)
    flat = torch.tensor([-16 * 2**0.5, -8 * 2**0.5, 16 * 2**0.5, 8 * 2**0.5])  # half as high as wide
    assert_close(anchors[0], flat, FLOAT32)


def test_anchors_refuse_another_number_of_levels():
    with pytest.raises(ValueError, match="for 5 levels, got 4 maps"):
        PyramidAnchors(STRIDES, 8.0, (1.0,))(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), grids(64, 64)[:4])


def matched_slowly(overlaps: list[list[float]], high: float, low: float, min_best: float) -> list[int]:
    """One candidate after the other, then one object after the other."""
    matches = []
    for column in zip(*overlaps, strict=True):
        best = max(range(len(column)), key=lambda i: column[i])
        matches.append(best if column[best] >= high else -2 if column[best] >= low else -1)
    for i, row in enumerate(overlaps):
        if max(row) >= min_best:
            for j, overlap in enumerate(row):
                if overlap == max(row):
                    matches[j] = i
    return matches


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("high", "low", "min_best"), [(0.75, 0.25, 0.25), (0.5, 0.5, 0.5)], ids=["rpn", "roi"])
def test_matches_are_those_of_the_slow_way(seed, high, low, min_best):
    generator = torch.Generator().manual_seed(seed)
    # sixteenths, so that there are ties and thresholds are met to the bit
    overlaps = torch.randint(0, 17, (4, 12), generator=generator) // torch.tensor([[1], [1], [2], [6]]) / 16
    expected = matched_slowly(overlaps.tolist(), high, low, min_best)
    assert MaxIoUMatcher(high, low, min_best)(overlaps).tolist() == expected


def test_an_object_takes_all_its_ties_even_from_another_that_overlaps_more():
    overlaps = torch.tensor([[0.9, 0.6, 0.0, 0.1], [0.4, 0.1, 0.4, 0.1], [0.0, 0.0, 0.0, 0.29]])
    # the third object is overlapped by too little to take anything
    assert MaxIoUMatcher(0.7, 0.3, 0.3)(overlaps).tolist() == [1, -2, 1, -1]


def decoded_slowly(codes: list[float], box: list[float], weights: tuple[float, ...]) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    x, y, w, h = (code / weight for code, weight in zip(codes, weights, strict=True))
    w, h = (min(max(value, -math.log(62.5)), math.log(62.5)) for value in (w, h))
    x, y = box[0] + width / 2 + x * width, box[1] + height / 2 + y * height
    width, height = width * math.exp(w), height * math.exp(h)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)], ids=["rpn", "roi"])
def test_boxes_are_decoded_as_the_slow_way_does(weights):
    codes = 5 * torch.tensor(weights).repeat(2) * torch.randn(50, 8)
    boxes = torch.rand(50, 2).repeat(1, 2) * 100 + torch.tensor([0.0, 0.0, 20.0, 30.0])
    decoded = ClampedBoxCoder(weights).decode_single(codes, boxes)
    expected = [
        decoded_slowly(code[:4], box, weights) + decoded_slowly(code[4:], box, weights)
        for code, box in zip(codes.tolist(), boxes.tolist(), strict=True)
    ]
    assert_close(decoded, torch.tensor(expected), FLOAT32)
    assert not torch.allclose(decoded, BoxCoder(weights).decode_single(codes, boxes))  # which clamps from above alone


def test_decoding_undoes_encoding():
    coder = ClampedBoxCoder((10.0, 10.0, 5.0, 5.0))
    reference = torch.tensor([[10.0, 20.0, 50.0, 44.0], [0.0, 0.0, 5.0, 7.0]])
    box = torch.tensor([[12.0, 18.0, 40.0, 60.0], [1.0, 2.0, 30.0, 4.0]])
    assert_close(coder.decode_single(coder.encode_single(box, reference), reference), box, FLOAT32)


def pooled_slowly(x: Tensor, box: list[float], stride: int, side: int, samples: int) -> Tensor:
    """Means over ``samples`` x ``samples`` bilinear samples a bin; pixel centres lie at halves, hence aligned."""
    left, top, right, bottom = (edge / stride - 0.5 for edge in box)
    offsets = (torch.arange(side * samples) + 0.5) / (side * samples)
    columns, rows = left + offsets * (right - left), top + offsets * (bottom - top)
    height, width = x.shape[1:]
    columns = columns.clamp(0, width - 1) / (width - 1) * 2 - 1
    rows = rows.clamp(0, height - 1) / (height - 1) * 2 - 1
    grid = torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], -1)
    return F.avg_pool2d(F.grid_sample(x[None], grid[None], align_corners=True), samples)[0]


def test_features_are_aligned_and_come_from_the_level_that_suits_the_box():
    maps = {str(i): torch.randn(2, 3, 160 // stride, 224 // stride) for i, stride in enumerate(STRIDES)}
    boxes = [
        torch.tensor([[8.0, 16.0, 40.0, 60.0], [3.0, 5.0, 220.0, 150.0]]),
        torch.tensor([[20.0, 20.0, 131.9, 132.0], [20.0, 20.0, 132.1, 132.0], [7.0, 8.0, 12.0, 40.0]]),
    ]
    pool = PyramidRoIAlign(STRIDES[:4], 4, 56.0, 2)
    assert pool.levels(torch.cat(boxes)).tolist() == [0, 1, 0, 1, 0]
    assert pool.levels(torch.tensor([[0.0, 0.0, 900.0, 900.0], [5.0, 5.0, 5.0, 5.0]])).tolist() == [3, 0]
    pooled = pool(maps, boxes)
    rows = [(image, box) for image, image_boxes in enumerate(boxes) for box in image_boxes]
    for got, (image, box), level in zip(pooled, rows, pool.levels(torch.cat(boxes)).tolist(), strict=True):
        expected = pooled_slowly(maps[str(level)][image], box.tolist(), STRIDES[level], 4, 2)
        assert_close(got, expected, FLOAT32)


def test_scales_do_not_depend_on_the_first_batch():
    box, pool = [torch.tensor([[8.0, 8.0, 40.0, 24.0]])], PyramidRoIAlign(STRIDES[:4], 7, 56.0, 0)
    wide = {str(i): torch.randn(1, 2, max(1, 40 // s), 1000 // s) for i, s in enumerate(STRIDES)}
    square = {str(i): torch.randn(1, 2, 256 // s, 256 // s) for i, s in enumerate(STRIDES)}
    fresh = pool(square, box)
    pool(wide, box, [(40, 1000)])
    assert_close(pool(square, box), fresh, EXACT)


def test_a_box_that_is_not_finite_keeps_its_place():
    maps = {str(i): torch.randn(1, 2, 64 // s, 64 // s) for i, s in enumerate(STRIDES)}
    box, pool = torch.tensor([[8.0, 8.0, 40.0, 24.0]]), PyramidRoIAlign(STRIDES[:4], 7, 56.0, 2)
    pooled = pool(maps, [torch.cat([torch.full((1, 4), torch.nan), box, box.flip(1)])])
    assert pooled.shape == (3, 2, 7, 7)
    assert_close(pooled[1:2], pool(maps, [box]), EXACT)


def test_no_boxes_have_no_features():
    maps = {str(i): torch.randn(1, 2, 64 // s, 64 // s) for i, s in enumerate(STRIDES)}
    assert PyramidRoIAlign(STRIDES[:4], 7, 56.0, 0)(maps, [torch.zeros(0, 4)]).shape == (0, 2, 7, 7)
