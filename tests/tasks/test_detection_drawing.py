"""Objects are drawn where they are, in their class's colour, with a label that stays in the picture."""

from __future__ import annotations

import pytest
import torch

from slabformer.tasks.detection.browse import browse
from slabformer.tasks.detection.config import DetectionAugment, DetectionData
from slabformer.tasks.detection.drawing import class_colour, draw_objects, tile
from slabformer.tasks.detection.loader import create_loader

GREY = torch.full((3, 80, 100), 128, dtype=torch.uint8)
BOX = torch.tensor([[20.0, 30.0, 60.0, 70.0]])


def test_a_box_has_its_classs_colour() -> None:
    drawn = draw_objects(GREY, BOX, torch.tensor([4]), ["owl"])
    assert drawn[:, 50, 20].tolist() == list(class_colour(4))
    assert torch.equal(drawn[:, 32:68, 22:58], GREY[:, 32:68, 22:58])
    assert torch.equal(GREY, torch.full_like(GREY, 128))  # a copy was drawn on


def test_a_mask_tints_what_it_covers_alone() -> None:
    mask = torch.zeros(1, 80, 100, dtype=torch.bool)
    mask[0, 40:50, 30:40] = True
    drawn = draw_objects(GREY, BOX, torch.tensor([4]), [""], mask)
    changed = (drawn != GREY).any(dim=0)[32:68, 22:58]
    assert torch.equal(changed, mask[0, 32:68, 22:58])


@pytest.mark.parametrize(("label", "letters"), [(1, 255), (2, 0)], ids=["white-on-blue", "black-on-green"])
@pytest.mark.parametrize("box", [[70.0, 0.0, 100.0, 20.0], [0.0, 60.0, 9.0, 80.0]], ids=["top-right", "bottom-left"])
def test_labels_stay_inside_and_can_be_read(box: list[float], label: int, letters: int) -> None:
    labelled = draw_objects(GREY, torch.tensor([box]), torch.tensor([label]), ["a tiny owl"])
    assert labelled.shape == GREY.shape
    colour = torch.tensor(class_colour(label))[:, None, None]
    assert (labelled == colour).all(dim=0).sum() > 200
    assert ((labelled.int() - letters).abs() < 60).all(dim=0).sum() > 20


def test_the_first_object_is_on_top() -> None:
    masks = torch.ones(2, 80, 100, dtype=torch.bool)
    alone = draw_objects(GREY, BOX, torch.tensor([4]), ["owl"], masks[:1])
    both = draw_objects(GREY, BOX.repeat(2, 1), torch.tensor([4, 5]), ["owl", "cat"], masks)
    place = (slice(None), slice(20, 31), slice(20, 40))  # label and edge of the box
    shown = (both[place] == torch.tensor(class_colour(4))[:, None, None]).all(dim=0)
    assert torch.equal(shown, (alone[place] == torch.tensor(class_colour(4))[:, None, None]).all(dim=0))
    assert shown.sum() > 50


def test_nothing_found_is_the_picture_itself() -> None:
    assert torch.equal(draw_objects(GREY, torch.zeros(0, 4), torch.zeros(0), []), GREY)


def test_no_two_of_a_hundred_classes_share_a_colour() -> None:
    assert len({class_colour(label) for label in range(100)}) == 100


def test_a_grid_holds_pictures_of_any_size() -> None:
    grid = tile([GREY, GREY[:, :40], GREY[:, :, :50]], columns=2, gap=4)
    assert grid.shape == (3, 2 * 84, 2 * 104)
    assert torch.equal(grid[:, 84:164, :50], GREY[:, :, :50])
    assert (grid[:, 40:80, 104:] == 255).all()


def test_browsing_shows_what_is_trained_on() -> None:
    augment = DetectionAugment(policy="none", size=128, max_size=128)
    loader = create_loader(DetectionData(), augment, "validation", batch_size=4, seed=0)
    assert browse(loader, 6, columns=3).shape == (3, 2 * 324, 3 * 324)
    with pytest.raises(ValueError, match="at least 1"):
        browse(loader, 0)
