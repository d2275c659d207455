"""Several right answers an image: ImageNet's reassessed labels (Beyer et al. 2020, "Are we done with ImageNet?")."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from slabformer.tasks.classification.shards import ShardSource
from slabformer.tasks.classification.sources import FolderSource, Source
from slabformer.tasks.engine.documents import read_json


class NumberedSource:
    """A source whose labels also tell the image's number: ``label + number * num_classes``.

    So the number comes through loaders as it is, whatever they leave out, and on every rank.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.class_names = source, source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image ``index`` and its class and number."""
        image, label = self.source.read(index)
        return image, label + index * len(self.class_names)

    def name(self, index: int) -> str:
        """As the source says."""
        return self.source.name(index)


class RealLabels:
    """The classes that are right for every image of a source; for some there are none.

    Args:
        accepted: Classes of each image, ``(N, K)``, filled up with -1.
        num_classes: Of the data.
    """

    def __init__(self, accepted: Tensor, num_classes: int) -> None:
        self.accepted, self.num_classes = accepted, num_classes

    @classmethod
    def load(cls, path: Path, source: Source) -> RealLabels:
        """The labels in ``path``, a JSON list of lists of classes, an image a list, in the order of file names.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else, or is of other images than ``source``.
        """
        lists = _read(path)
        names = _file_names(source)
        if len(lists) != len(names):
            raise ValueError(f"{path} has labels of {len(lists):,} images, the data has {len(names):,}")
        num_classes = len(source.class_names)
        largest = max((label for labels in lists for label in labels), default=0)
        if largest >= num_classes:
            raise ValueError(f"{path} has labels up to {largest}, the data {num_classes} classes; is it of other data?")
        accepted = torch.full((len(lists), max(1, *map(len, lists))), -1)
        for labels, index in zip(lists, sorted(range(len(names)), key=names.__getitem__), strict=True):
            accepted[index, : len(labels)] = torch.tensor(labels, dtype=torch.long)
        return cls(accepted, num_classes)

    def split(self, numbered: Tensor) -> tuple[Tensor, Tensor]:
        """Labels ``(B,)`` of a :class:`NumberedSource` as classes ``(B,)`` and as accepted classes ``(B, K)``."""
        numbers = numbered // self.num_classes
        return numbered % self.num_classes, self.accepted.to(numbered.device)[numbers]


def _read(path: Path) -> list[list[int]]:
    lists = read_json(path)
    if not isinstance(lists, list) or not all(
        isinstance(labels, list) and all(isinstance(label, int) and label >= 0 for label in labels) for labels in lists
    ):
        raise ValueError(f"{path} is not a list of lists of classes, one for each validation image in name order")
    return lists


def _file_names(source: Source) -> list[str]:
    if not isinstance(source, (FolderSource, ShardSource)):
        raise ValueError("real labels go by the names of image files; give a folder or wds/FOLDER as data")
    # a shard stands before a colon, folders before slashes
    names = [Path(source.name(index).rpartition(":")[2]).name for index in range(len(source))]
    (name, count), *_ = Counter(names).most_common(1)
    if count > 1:
        raise ValueError(f"{count} images are called {name}; real labels go by file names")
    return names
