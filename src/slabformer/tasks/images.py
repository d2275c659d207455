"""One way to read an image, whatever it is stored as, and one way to go on where that fails."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image, ImageOps

from slabformer.tasks.engine.order import Stream

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: name of an image, and why it could not be read
Failure = tuple[str, str]
MOST_REPLACEMENTS = 100

#: suffixes taken for images when a folder is listed
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: what Pillow raises over a file that is no image, cut short or damaged
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(file: str | Path | IO[bytes], *, upright: bool = True) -> Image.Image:
    """The image in ``file`` as RGB: transparency laid on white, grey spread, turned as EXIF says if ``upright``.

    Raises:
        OSError, SyntaxError, ValueError, ...: One of :data:`UNREADABLE` when it cannot be decoded.
    """
    with Image.open(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if upright else image)


def reason_of(error: Exception) -> str:
    """One of :data:`UNREADABLE` in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as RGB."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to white
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def image_files(folder: Path) -> list[Path]:
    """Every image file below ``folder``, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """``paths`` with folders replaced by the images below them.

    Raises:
        ValueError: If a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        files = image_files(path) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"no images in {path}; give image files, or a folder that holds some")
        found += files
    return found


def candidates(seed: int, epoch: int, index: int, count: int, *, replace: bool) -> Iterator[int]:
    """Image ``index``, then others of ``count`` in its place, drawn from (seed, epoch, index), if ``replace``."""
    yield index
    if replace:
        others = np.random.default_rng((Stream.REPLACE, seed, epoch, index))
        yield from (int(others.integers(count)) for _ in range(MOST_REPLACEMENTS))


def first_readable(
    indices: Iterable[int], read: Callable[[int], T], name: Callable[[int], str]
) -> tuple[T | None, list[Failure]]:
    """What ``read`` gives for the first of ``indices`` that it can read, if any, and what it could not."""
    failures: list[Failure] = []
    for index in indices:
        try:
            return read(index), failures
        except UNREADABLE as error:
            failures.append((name(index), f"{type(error).__name__}: {error}"))
    return None, failures


def most_unreadable(setting: float, num_images: int) -> int:
    """How many of ``num_images`` a ``data.max_unreadable`` allows: a share of them below 1, a count from 1 on."""
    return int(setting * num_images if setting < 1 else setting)


class Unreadable:
    """Counts images that cannot be read, tells of each once, and stops when they are too many.

    Args:
        limit: How many are put up with; see :func:`most_unreadable`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: dict[str, str] = {}

    def count(self, failures: Iterable[Failure]) -> None:
        """Note images that could not be read.

        Raises:
            RuntimeError: If there are more than ``limit``.
        """
        for name, reason in failures:
            if name not in self.names:
                self.names[name] = reason
                logger.warning("unreadable image %s (%s); %d so far", name, reason, len(self.names))
        if len(self.names) > self.limit:
            first = ", ".join(list(self.names)[:3])
            raise RuntimeError(
                f"{len(self.names)} images cannot be read (first: {first}), data.max_unreadable allows "
                f"{self.limit}; repair or remove them, or raise the limit"
            )
