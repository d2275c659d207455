"""What can be set of a detector."""

from slabformer._detector import DetectorConfig

__all__ = ["DetectorConfig"]
