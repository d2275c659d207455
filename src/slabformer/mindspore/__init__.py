"""Models of this library, and any others that ``torch.export`` takes, for MindSpore.

slabformer.mindspore.from_torch(fused, images, "swin")     # source and .ckpt in a folder, verified; a Cell

Imported on demand only: nothing else here imports it, and MindSpore is imported when a name is used that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slabformer.mindspore import cells, functions
    from slabformer.mindspore.callbacks import ProgressiveCallback
    from slabformer.mindspore.convert import build, from_torch, runtime_of, write_model
    from slabformer.mindspore.files import load, read_checkpoint, state_of, write_checkpoint
    from slabformer.mindspore.graph import ConversionError
    from slabformer.mindspore.mindir import export_mindir, load_mindir
    from slabformer.mindspore.zoo import create_model, load_into_torch, save_from_torch

__all__ = [
    "ConversionError",
    "ProgressiveCallback",
    "build",
    "cells",
    "create_model",
    "export_mindir",
    "from_torch",
    "functions",
    "load",
    "load_into_torch",
    "load_mindir",
    "read_checkpoint",
    "runtime_of",
    "save_from_torch",
    "state_of",
    "write_checkpoint",
    "write_model",
]
_HOMES = {
    "ConversionError": "graph",
    "ProgressiveCallback": "callbacks",
    "build": "convert",
    "create_model": "zoo",
    "export_mindir": "mindir",
    "from_torch": "convert",
    "load": "files",
    "load_into_torch": "zoo",
    "load_mindir": "mindir",
    "read_checkpoint": "files",
    "runtime_of": "convert",
    "save_from_torch": "zoo",
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
