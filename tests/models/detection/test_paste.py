from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slabformer.models.detection import paste
from slabformer.models.detection.paste import paste_masks, rescale_boxes
from tolerances import EXACT, assert_close


def pasted_slowly(mask: Tensor, box: list[float], height: int, width: int, threshold: float) -> Tensor:
    """Pixel by pixel: its centre in cells of the mask, then the four cells around, those outside being 0."""
    side = mask.shape[-1]
    out = torch.zeros(height, width, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            x = (column + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
            y = (row + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
            value = 0.0
            for i in (int(y // 1), int(y // 1) + 1):
                for j in (int(x // 1), int(x // 1) + 1):
                    if 0 <= i < side and 0 <= j < side:
                        value += mask[i, j].item() * (1 - abs(y - i)) * (1 - abs(x - j))
            out[row, column] = value >= threshold
    return out


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_masks_are_pasted_as_pixel_by_pixel(threshold):
    masks = torch.rand(5, 1, 7, 7)
    boxes = torch.tensor(
        [[2.3, 3.1, 12.7, 9.9], [0.0, 0.0, 20.0, 15.0], [15.2, 10.5, 20.0, 15.0], [4.6, 4.4, 5.5, 5.7], [-3, -2, 9, 6]]
    )
    expected = [pasted_slowly(m[0], b, 15, 20, threshold) for m, b in zip(masks, boxes.tolist(), strict=True)]
    pasted = paste_masks(masks, boxes, (15, 20), threshold)
    assert 0 < pasted.sum() < pasted.numel()
    assert_close(pasted, torch.stack(expected), EXACT)


def test_chunks_change_nothing(monkeypatch):
    masks, boxes = torch.rand(7, 1, 28, 28), torch.rand(7, 4) * 10 + torch.tensor([0.0, 0.0, 15.0, 15.0])
    whole = paste_masks(masks, boxes, (30, 40))
    monkeypatch.setattr(paste, "CHUNK", 2 * 30 * 40)
    assert_close(paste_masks(masks, boxes, (30, 40)), whole, EXACT)


def test_no_masks_and_empty_boxes_paste_to_nothing():
    assert paste_masks(torch.rand(0, 1, 28, 28), torch.rand(0, 4), (5, 6)).shape == (0, 5, 6)
    assert not paste_masks(torch.ones(1, 1, 28, 28), torch.tensor([[3.0, 3.0, 3.0, 3.0]]), (8, 8)).any()


def test_boxes_are_rescaled_on_either_axis():
    boxes = rescale_boxes(torch.tensor([[10.0, 20.0, 30.0, 40.0]]), (100, 200), (50, 600))
    assert_close(boxes, torch.tensor([[30.0, 10.0, 90.0, 20.0]]), EXACT)
