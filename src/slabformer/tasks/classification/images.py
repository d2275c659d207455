"""One way to read an image, whatever it is stored as."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

#: suffixes taken for images when a folder is listed
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: what Pillow raises over a file that is no image, cut short or damaged
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(file: str | Path | IO[bytes]) -> Image.Image:
    """The image in ``file`` as upright RGB: turned as its EXIF data says, transparency laid on white, grey spread.

    Raises:
        OSError, SyntaxError, ValueError, ...: One of :data:`UNREADABLE` when it cannot be decoded.
    """
    with Image.open(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


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
