import contextlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from image_folders import picture
from slabformer.tasks.classification.augment import (
    AugmentConfig,
    eval_transform,
    light_augment,
    light_draws,
    train_transform,
)
from slabformer.tasks.classification.config import DataConfig
from slabformer.tasks.engine.seeds import draws_from

DATA = DataConfig(image_size=32)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_hang_on_every_key_and_nothing_else() -> None:
    drawn = {}
    for keys in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]:
        random.seed(len(drawn)), np.random.seed(len(drawn)), torch.manual_seed(len(drawn))
        with draws_from(*keys):
            drawn[keys] = draw()
        with draws_from(*keys):
            assert draw() == drawn[keys]
    for values in zip(*drawn.values(), strict=True):
        assert len(set(values)) == len(drawn)


def test_generators_go_on_where_they_were_even_after_an_error() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with contextlib.suppress(KeyError), draws_from(5, 6, 7):
        draw()
        raise KeyError
    assert draw() == expected


def test_the_published_recipe_varies_with_the_draw() -> None:
    transform, image = train_transform(DATA, AugmentConfig()), picture(0)
    results = []
    for index in (0, 1, 0):
        with draws_from(0, 0, index):
            results.append(transform(image))
    assert results[0].shape == (3, 32, 32)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_the_strongest_draws_of_the_published_recipe_are_survived() -> None:
    transform, image = train_transform(DATA, AugmentConfig(auto_augment="rand-m10-n15-inc1")), picture(0)
    for index in range(3):
        with draws_from(0, 0, index):
            assert transform(image).std() > 0


def test_validation_resizes_by_crop_pct_and_crops_the_centre() -> None:
    image = picture(0, size=(256, 256))
    whole = eval_transform(DataConfig(image_size=256, crop_pct=1.0), normalize=False)(image)
    cropped = eval_transform(DataConfig(image_size=224, crop_pct=0.875), normalize=False)(image)
    assert torch.equal(cropped, whole[:, 16:240, 16:240])


def test_normalisation_follows_mean_and_std() -> None:
    data = DataConfig(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    raw = eval_transform(data, normalize=False)(picture(0)).float() / 255
    expected = (raw - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    assert (eval_transform(data)(picture(0)) - expected).abs().max() <= 1e-5 * expected.std()


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(
        ValueError, match="interpolation must be 'bicubic', 'bilinear', 'nearest' or 'lanczos', got 'cubic'"
    ):
        eval_transform(DataConfig(interpolation="cubic"))


def test_light_augmentation_is_an_affine_map_of_square_images() -> None:
    images, draws, config = torch.rand(6, 2, 9, 9), torch.rand(6, 4) * 2 - 1, AugmentConfig()
    angle, size = draws[:, 0] * np.pi / 18, 1 + draws[:, 1] * 0.1
    cos, sin = angle.cos() / size, angle.sin() / size
    theta = torch.stack([cos, -sin, draws[:, 2] * 0.16, sin, cos, draws[:, 3] * 0.16], dim=1).view(-1, 2, 3)
    expected = F.grid_sample(images, F.affine_grid(theta, [6, 2, 9, 9], align_corners=False), align_corners=False)
    assert (
        light_augment(images, draws, config) - expected
    ).abs().max() <= 1e-4  # the coordinates round, not the values


def test_light_augmentation_without_draws_changes_nothing() -> None:
    images = torch.rand(3, 1, 8, 12)
    assert torch.allclose(light_augment(images, torch.zeros(3, 4), AugmentConfig()), images, atol=1e-5)


def test_light_augmentation_does_not_hang_on_the_batch() -> None:
    images, draws, config = torch.rand(7, 1, 32, 32), light_draws(0, 0, 7), AugmentConfig()
    together = light_augment(images, draws, config)
    for index in range(7):
        alone = light_augment(images[index : index + 1], draws[index : index + 1], config)
        assert torch.equal(alone[0], together[index])


def test_light_draws_differ_by_epoch_and_seed() -> None:
    first = light_draws(0, 0, 100)
    assert first.shape == (100, 4)
    assert first.abs().max() <= 1
    assert not torch.equal(first, light_draws(0, 1, 100))
    assert not torch.equal(first, light_draws(1, 0, 100))
    assert torch.equal(first, light_draws(0, 0, 100))
