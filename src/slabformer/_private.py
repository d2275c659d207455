"""Private names of other packages, looked up by name: a release that lacks one costs one feature, not the import."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPrivateNameError(ImportError):
    """The installed release of a package lacks a private name that others have."""


def private(name: str, checked_with: tuple[str, str]) -> Any:
    """``package._some.thing`` by its dotted name.

    Args:
        name: Package, modules and attributes.
        checked_with: The lowest and the highest version of the package that were seen to have it.

    Raises:
        MissingPrivateNameError: If it is not there; says which versions have it.
    """
    package, *rest = name.split(".")
    root = found = importlib.import_module(package)
    module = package
    for part in rest:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            try:
                found = importlib.import_module(module)
                continue
            except ImportError:
                raise MissingPrivateNameError(
                    f"{package} {root.__version__} has no {name}, which slabformer needs here; it is checked with "
                    f"{package} {' to '.join(dict.fromkeys(checked_with))}: install one of these, or a newer slabformer"
                ) from None
        found = getattr(found, part)
    return found
