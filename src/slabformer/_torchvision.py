"""Every private name of torchvision that this package uses: parts of its detectors."""

from __future__ import annotations

# bases of our classes, by name, for type checkers
from torchvision.models.detection._utils import BoxCoder, Matcher

__all__ = ["BoxCoder", "Matcher"]

CHECKED_WITH = ("0.26", "0.29")
