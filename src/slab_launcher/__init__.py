"""The `slab` command's entry point, outside the package so that `slab --help` does not wait for torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def main() -> int:
    """Run ``slabformer/cli/main.py`` by path: importing it by name runs ``slabformer/__init__.py``, hence torch."""
    package = importlib.util.find_spec("slabformer")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "cli" / "main.py"
    spec = importlib.util.spec_from_file_location("slab_main", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()
