"""Models of this library, and any others that ``torch.export`` takes, for MindSpore.

slabformer.mindspore.from_torch(fused, images, "swin")     # source and .ckpt in a folder, verified; a Cell

Imported on demand only: nothing else here imports it, and MindSpore is imported when a name is used that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slabformer.mindspore import cells, functions
    from slabformer.mindspore.convert import build, from_torch, write_model
    from slabformer.mindspore.files import load, read_checkpoint, state_of, write_checkpoint
    from slabformer.mindspore.graph import ConversionError

__all__ = [
    "ConversionError",
    "build",
    "cells",
    "from_torch",
    "functions",
    "load",
    "read_checkpoint",
    "state_of",
    "write_checkpoint",
    "write_model",
]
_HOMES = {
    "ConversionError": "graph",
    "build": "convert",
    "from_torch": "convert",
    "load": "files",
    "read_checkpoint": "files",
    "state_of": "files",
    "write_checkpoint": "files",
    "write_model": "convert",
}


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
