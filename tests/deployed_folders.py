"""Deployed folders, run as their users run them: where neither this library nor torch is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tolerances import PATIENCE

HIDING = """
import runpy, sys
class Hidden:
    def find_spec(self, name, *_):
        if name.split(".")[0] in HIDDEN:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Hidden())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def printed_by(folder: Path, *arguments: object, hidden: tuple[str, ...] = ("torch", "slabformer")) -> str:
    """What ``run.py`` prints without the packages ``hidden``; on its example, unless ``arguments`` name others."""
    arguments = arguments or (folder / "example.npz",)
    command = [sys.executable, "-c", f"HIDDEN = {set(hidden)}\n{HIDING}", str(folder / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
