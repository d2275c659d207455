"""One way to read an image, whatever it is stored as, and one way to go on where that fails."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps

from slabformer._listing import check_regular, files_below
from slabformer.tasks.engine.order import Stream

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: name of an image, and why it could not be read
Failure = tuple[str, str]
MOST_REPLACEMENTS = 100

#: greatest value of a grey image of so many bits, for each number of bits that a deeper file may hold
GREY_LEVELS = {8: 2**8 - 1, 12: 2**12 - 1, 16: 2**16 - 1}
_LOGGED_DEPTHS: set[tuple[str, str]] = set()
#: what Pillow raises over a file that is no image, cut short or damaged
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(file: str | Path | IO[bytes], *, upright: bool = True) -> Image.Image:
    """The image in ``file`` as RGB: transparency laid on white, grey spread, turned as EXIF says if ``upright``.

    Raises:
        OSError, SyntaxError, ValueError, ...: One of :data:`UNREADABLE` when it cannot be decoded, or is no file
            on a disk.
    """
    if isinstance(file, (str, Path)):
        check_regular(file)
    with Image.open(file) as image:
        image.load()
        name = file if isinstance(file, (str, Path)) else "an image"
        return to_rgb(ImageOps.exif_transpose(image) if upright else image, name)


def reason_of(error: Exception) -> str:
    """One of :data:`UNREADABLE` in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def to_rgb(image: Image.Image, name: str | Path = "an image") -> Image.Image:
    """``image`` as RGB.

    Grey of more than 8 bits is told by its values, since files do not say how many of their bits are used: 8, 12 or 16
    bits, or floats in [0, 1]. What is not the most that the file could hold is logged, once a kind.

    Args:
        image: In any of Pillow's modes.
        name: What to call it in the log.

    Raises:
        ValueError: If its values are negative, too large for 16 bits or not finite.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_spread(np.asarray(image), str(name))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _spread(grey: np.ndarray, name: str) -> np.ndarray:
    """Grey of any depth as 8 bits."""
    lowest, highest = float(grey.min()), float(grey.max())
    if not 0 <= lowest <= highest <= GREY_LEVELS[16]:  # NaN too
        raise ValueError(
            f"its grey values run from {lowest:g} to {highest:g}, allowed are 0 to {GREY_LEVELS[16]} "
            "or floats in [0, 1]; save it as 8 bits"
        )
    if grey.dtype.kind == "f" and highest <= 1:
        _log_depth("floats", "in [0, 1]", name)
        return (grey * 255).round().astype(np.uint8)
    bits = next(bits for bits, most in GREY_LEVELS.items() if highest <= most)
    if bits < 16 or grey.dtype.kind == "f":
        stored = "floats" if grey.dtype.kind == "f" else f"{8 * grey.dtype.itemsize} bits"
        _log_depth(stored, f"of {bits} bits", name)
    return (grey.astype(np.uint32) >> (bits - 8)).astype(np.uint8)


def _log_depth(stored: str, taken: str, name: str) -> None:
    """Once for each way in which grey is stored and taken."""
    if (stored, taken) not in _LOGGED_DEPTHS:
        _LOGGED_DEPTHS.add((stored, taken))
        logger.warning("%s: grey stored as %s is taken as values %s, by the largest of them", name, stored, taken)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in small letters, of the formats that Pillow can decode."""
    suffixes = Image.registered_extensions()
    no_images = {"MPEG"} | {name for name, (made, _) in Image.OPEN.items() if _is_stub(made)}
    return frozenset(suffix for suffix, name in suffixes.items() if name in Image.OPEN and name not in no_images)


def _is_stub(made: object) -> bool:
    """Whether Pillow knows a format by its header alone."""
    return isinstance(made, type) and issubclass(made, ImageFile.StubImageFile)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image when a folder is listed."""
    return Path(name).suffix.lower() in image_suffixes()


def image_files(folder: Path) -> list[Path]:
    """Every image file below ``folder``, sorted; hidden ones are left out."""
    return [Path(path) for path in files_below(folder, is_image_name)]


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
