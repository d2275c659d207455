"""The whole way of a trained model that loses its norms: fit, fade, distil, recalibrate, fuse, verify, report.

`lose_norms` is the whole of it in one call. Its names are imported when first used: the command line reads recipes
without torch. They are not among those of `slabformer` itself, which needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slabformer.converting.config import ConvertConfig
    from slabformer.converting.result import ConvertResult
    from slabformer.converting.run import convert, lose_norms

__all__ = ["ConvertConfig", "ConvertResult", "convert", "lose_norms"]
_HOMES = {"ConvertConfig": "config", "ConvertResult": "result", "convert": "run", "lose_norms": "run"}


def __getattr__(name: str) -> Any:
    """A public name of this package, imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
