"""Optional dependencies: imported when used, with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra brings it.

    Raises:
        ImportError: If the module cannot be found; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        message = f"slabformer needs {error.name} for this; pip install 'slabformer[{extra}]'"
        raise ImportError(message) from error
