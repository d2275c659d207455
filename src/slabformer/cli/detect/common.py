"""What the verbs of `slab detect` share: the pictures that two forms of a detector are compared on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from slabformer.cli.parser import Parser
from slabformer.settings import NonEmptyStr, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from slabformer.tasks.detection.saved import DetectorInfo

#: shorter side of random pictures, at most: they are compared in float64, which takes its time
SMALL = 256
#: heights and widths in proportion
SHAPES = ((3, 4), (7, 5), (1, 1), (2, 3))


def add_picture_options(parser: Parser) -> None:
    """``--data`` and ``--num-images``."""
    parser.add_argument(
        "--data", type=NonEmptyStr | None, help="compare on validation images of this data set, or of digits"
    )
    parser.add_argument(
        "--num-images", type=PositiveInt, default=4, help="how many to compare on; random ones without --data"
    )


def compared_pictures(config: Namespace, info: DetectorInfo) -> Iterator[Tensor]:
    """Images ``(3, H, W)`` in [0, 1], in the size for evaluation.

    Raises:
        FileNotFoundError: If the data set is not where it should be.
    """
    from slabformer.tasks.detection.config import DetectionAugment, DetectionData
    from slabformer.tasks.detection.loader import create_loader

    if config.data is None:
        return _random_pictures(config.num_images, min(info.size, SMALL), info.max_size)
    data = DetectionData(path=config.data, masks=False)
    augment = DetectionAugment(policy="none", size=info.size, max_size=info.max_size)
    loader = create_loader(data, augment, "validation", batch_size=1, seed=0, rank=0, world_size=1, num_workers=0)
    return islice(chain.from_iterable(batch.images for batch in loader), config.num_images)


def _random_pictures(count: int, short: int, long: int) -> Iterator[Tensor]:
    import torch

    from slabformer.tasks.detection.transforms import keep_ratio

    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        yield torch.rand(3, *keep_ratio(SHAPES[i % len(SHAPES)], short, long), generator=generator)
