"""Small data sets on disk, for tests of what reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """A colourful image that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def fill_classes(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write ``counts[name]`` PNG files into ``folder/name``."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(seed + 1000 * number + index).save(folder / name / f"{index:03d}.png")
    return folder


def fill_splits(folder: Path, train: int = 6, validation: int = 3) -> Path:
    """``folder/train`` and ``folder/val`` with the classes cat, dog and owl."""
    fill_classes(folder / "train", dict.fromkeys(("cat", "dog", "owl"), train))
    fill_classes(folder / "val", dict.fromkeys(("cat", "dog", "owl"), validation), seed=500)
    return folder


def write_shard(path: Path, samples: dict[str, tuple[int, int]]) -> None:
    """A WebDataset shard of ``{key: (seed of the picture, label)}``; a label below 0 is left out."""
    with tarfile.open(path, "w") as tar:
        for key, (seed, label) in samples.items():
            content = io.BytesIO()
            picture(seed).save(content, "PNG")
            _add(tar, f"{key}.png", content.getvalue())
            if label >= 0:
                _add(tar, f"{key}.cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
