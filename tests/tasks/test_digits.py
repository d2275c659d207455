import hashlib

import numpy as np
import pytest

from slabformer.tasks.classification.digits import DigitsSource
from slabformer.tasks.classification.split import held_out


def test_digits_are_split_for_good() -> None:
    train, validation = DigitsSource("train"), DigitsSource("validation")
    assert (len(train), len(validation)) == (1437, 360)
    assert np.bincount(validation.labels).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    # accuracies are only comparable while this split stays as it is
    assert hashlib.sha256(validation.images.tobytes()).hexdigest()[:16] == "c1f4ab5c0fdba70c"


def test_digits_use_the_whole_grey_scale() -> None:
    source = DigitsSource("train")
    assert (source.images.min(), source.images.max()) == (0, 255)
    image, label = source.read(0)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert label == source.labels[0]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.5, 1.0])
def test_every_class_is_held_out_in_proportion(fraction: float) -> None:
    labels = np.repeat(np.arange(5), [3, 10, 11, 29, 30])
    marked = held_out(labels, fraction, seed=1)
    assert marked.sum() == np.ceil(round(len(labels) * fraction, 6))
    for label, size in enumerate([3, 10, 11, 29, 30]):
        assert abs(marked[labels == label].sum() - size * fraction) < 1


def test_the_seed_picks_other_samples() -> None:
    labels = np.zeros(100, dtype=int)
    assert not np.array_equal(held_out(labels, 0.5, 0), held_out(labels, 0.5, 1))
    assert np.array_equal(held_out(labels, 0.5, 0), held_out(labels, 0.5, 0))


def test_a_fraction_beyond_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"validation_fraction must be in \[0, 1\], got 1.5"):
        held_out([0, 1], 1.5, 0)
