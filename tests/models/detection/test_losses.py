"""Assignment, sampling and losses of both stages against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou

from detectors import objects, small_detector
from slabformer.models.detection.roi_heads import box_losses, mask_loss, mask_targets
from slabformer.models.detection.rpn import ProposalNetwork
from tolerances import EXACT, FLOAT32, assert_close


@pytest.fixture(scope="module")
def rpn() -> ProposalNetwork:
    """The first stage of a detector."""
    return small_detector().rpn


def test_loss_of_anchors_is_that_of_a_loop(rpn, monkeypatch):
    labels = [torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0]), torch.tensor([0.0, -1.0, -1.0, 1.0, 0.0])]
    sampled = ([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]], [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]])
    masks = tuple([torch.tensor(row, dtype=torch.uint8) for row in rows] for rows in sampled)
    monkeypatch.setattr(rpn, "fg_bg_sampler", lambda labels: masks)
    logits, codes, targets = torch.randn(10, 1), torch.randn(10, 4), list(torch.randn(2, 5, 4))
    expected_score = expected_box = 0.0
    for index in (0, 8, 1, 5, 9):
        image, anchor = divmod(index, 5)
        score = 1 / (1 + math.exp(-logits[index].item()))
        if labels[image][anchor] == 1:
            expected_score -= math.log(score)
            expected_box += sum(abs(a - b) for a, b in zip(codes[index], targets[image][anchor], strict=True))
        else:
            expected_score -= math.log(1 - score)
    losses = rpn.compute_loss(logits, codes, labels, targets)
    assert_close(torch.stack(losses), torch.tensor([expected_score, expected_box]) / 5, FLOAT32)


def test_anchors_beyond_an_images_own_padding_are_left_out(rpn):
    # 70x100 pads to 96x128 by itself, whatever the batch pads to
    anchors = torch.tensor([[x - 9.0, y - 9.0, x + 9.0, y + 9.0] for x in range(0, 192, 16) for y in range(0, 192, 16)])
    boxes = torch.tensor([[85.0, 57.0, 100.0, 70.0], [151.0, 151.0, 169.0, 169.0]])
    labels, matched = rpn.match(anchors, boxes, (70, 100))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    inside = (centres[:, 0] < 128) & (centres[:, 1] < 96)
    assert (labels[~inside] == -1).all()  # the second object's best is among them
    overlaps = box_iou(boxes, anchors)
    assert 0.3 < overlaps[0].max() < 0.7 < overlaps[1].max()
    assert labels[inside].sum() == (overlaps[0] == overlaps[0].max()).sum()
    assert_close(matched[overlaps[0].argmax()], boxes[0], EXACT)


def test_anchors_of_an_image_without_objects_are_background(rpn):
    anchors = torch.tensor([[-8.0, -8.0, 8.0, 8.0], [60.0, 0.0, 76.0, 16.0]])
    labels, matched = rpn.match(anchors, torch.zeros(0, 4), (20, 30))
    assert labels.tolist() == [0, -1]
    assert matched.shape == (2, 4)


def test_losses_of_proposals_are_those_of_a_loop():
    logits, codes, targets = torch.randn(6, 4), torch.randn(6, 16), torch.randn(6, 4)
    labels = torch.tensor([0, 2, 0, 3, 1, 0])
    expected_class = expected_box = 0.0
    for row, label in enumerate(labels.tolist()):
        expected_class -= math.log(logits[row].softmax(0)[label].item())
        if label:
            expected_box += sum(abs(codes[row, 4 * label + i] - targets[row, i]) for i in range(4))
    losses = box_losses(logits, codes, labels, targets)
    assert_close(torch.stack(losses), torch.tensor([expected_class, expected_box]) / 6, FLOAT32)


def test_mask_targets_are_shares_of_a_bin_cut_at_a_half():
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, 4:12, 4:12] = 1
    masks[1, :, 10:] = 1
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0], [8.0, 0.0, 16.0, 8.0], [8.0, 0.0, 16.0, 8.0]])
    targets = mask_targets(masks, boxes, torch.tensor([0, 0, 1]), 4)
    assert targets[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert targets[1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert targets[2].tolist() == [[0, 1, 1, 1]] * 4


def test_loss_of_masks_is_that_of_the_labelled_class():
    logits, targets, labels = torch.randn(2, 4, 3, 3), torch.randint(0, 2, (2, 3, 3)).float(), torch.tensor([3, 1])
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        for logit, target in zip(logits[row, label].flatten(), targets[row].flatten(), strict=True):
            total -= math.log(torch.sigmoid(logit if target else -logit).item())
    assert_close(mask_loss(logits, labels, targets), torch.tensor(total / 18), FLOAT32)


def test_no_masks_lose_nothing_but_keep_the_graph():
    logits = torch.randn(0, 4, 28, 28, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0, 28, 28))
    assert loss.item() == 0
    loss.backward()


def test_an_object_is_its_own_proposal():
    heads = small_detector().roi_heads
    target = objects(4, (64, 96))
    nowhere = [torch.tensor([[0.0, 0.0, 2.0, 2.0]])]
    boxes, matches, labels, codes = heads.select_training_samples(nowhere, [target])
    positive = labels[0] > 0
    assert_close(boxes[0][positive], target["boxes"], EXACT)
    assert_close(labels[0][positive], target["labels"], EXACT)
    assert matches[0][positive].tolist() == [0, 1, 2, 3]
    assert codes[0][positive].abs().max() < 1e-5
