"""Optional dependencies: imported when used, with an error that names the extra, and without their telemetry."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra brings it.

    Raises:
        ImportError: If the module cannot be found; the message holds the command that installs it.
    """
    package = module.split(".")[0]
    _switch_telemetry_off(package)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(_told(package, extra)) from error


def check_installed(package: str, extra: str) -> None:
    """What :func:`require` says of a package that is not there, without importing one that is.

    Raises:
        ImportError: See :func:`require`.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(_told(package, extra))


def _told(package: str, extra: str) -> str:
    return f"slabformer needs {package} for this; pip install 'slabformer[{extra}]'"


def _switch_telemetry_off(package: str) -> None:
    """Keep the runtimes from writing identifiers to the disk and from reporting their use, in this process alone.

    Without it, importing onnxruntime 1.32 leaves ``.ses`` in the temporary folder and an identifier in
    ``~/.cache/Microsoft``, importing openvino or nncf one in ``~/intel``. What the environment says wins.
    """
    if package == "onnxruntime":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    elif package in ("openvino", "nncf"):
        # both do without this package where it is not installed
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
