"""The handwritten digits that come with scikit-learn: 1,797 real images of 8x8, for the quickstart and for tests."""

from __future__ import annotations

import numpy as np
from PIL import Image

from slabformer._extras import require
from slabformer.tasks.classification.split import held_out

CLASS_NAMES = [str(digit) for digit in range(10)]
VALIDATION_FRACTION, SPLIT_SEED = 0.2, 0
LARGEST_GREY = 16


class DigitsSource:
    """One side of a fixed, stratified 80/20 split: 1,437 digits to train on, 360 to validate.

    Args:
        split: "train" or "validation".

    Raises:
        ImportError: If scikit-learn is missing; names the extra that brings it.
    """

    class_names = CLASS_NAMES

    def __init__(self, split: str) -> None:
        data = require("sklearn.datasets", extra="train").load_digits()
        chosen = held_out(data.target, VALIDATION_FRACTION, SPLIT_SEED) == (split == "validation")
        self.images = (data.images[chosen] * (255 / LARGEST_GREY)).round().astype(np.uint8)
        self.labels = data.target[chosen].astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Digit ``index`` as RGB of 8x8 pixels, and its class."""
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])

    def name(self, index: int) -> str:
        """What to call digit ``index`` in a message."""
        return f"digits/{index}"
