"""RoIAlign as matrix products, held to torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from slabformer.models.detection.separable_align import is_cheaper, separable_roi_align


def rois() -> torch.Tensor:
    """Boxes inside, across and beyond the borders of 80x112 pixels, two on one image and none on another."""
    boxes = [[3.0, 5.0, 40.5, 33.0], [-30.0, -9.0, 20.0, 90.0], [90.0, 60.0, 140.0, 130.0], [7.0, 7.0, 7.0, 7.0]]
    images = torch.tensor([[0.0], [0.0], [2.0], [2.0]])
    return torch.cat([images, torch.tensor(boxes)], 1).double()


@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
@pytest.mark.parametrize("side", [7, 14])
def test_it_computes_what_torchvision_does_forward_and_backward(side: int, sampling_ratio: int) -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.randn(3, 5, 20, 28, dtype=torch.float64) for _ in range(2))
    theirs = ours.clone()
    ours.requires_grad_(), theirs.requires_grad_()
    actual = separable_roi_align(ours, rois(), side, 0.25, sampling_ratio)
    expected = roi_align(theirs, rois(), (side, side), 0.25, sampling_ratio, aligned=True)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(actual)
    actual.backward(grad), expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_no_boxes_give_no_features() -> None:
    features = torch.randn(2, 5, 8, 8, requires_grad=True)
    pooled = separable_roi_align(features, torch.zeros(0, 5), 7, 0.25, 2)
    assert pooled.shape == (0, 5, 7, 7)
    pooled.sum().backward()


def test_it_is_for_training_on_small_maps_with_a_fixed_number_of_samples() -> None:
    small = torch.zeros(1, 4, 32, 32, requires_grad=True)
    assert is_cheaper(small, 2)
    assert not is_cheaper(small, 0)
    assert not is_cheaper(small.detach(), 2)
    assert not is_cheaper(torch.zeros(1, 4, 200, 336, requires_grad=True), 2)
