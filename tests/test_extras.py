"""Optional dependencies are named when they are missing, and kept from leaving identifiers behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slabformer import _extras

IMPORT = """
import runpy, sys
require = runpy.run_path(sys.argv[1])["require"]
for name in sys.argv[2:]:
    require(name, "export")
"""


def left_by_importing(home: Path, *names: str, **environment: str) -> set[str]:
    """Files in the home and temporary folder ``home`` after importing ``names`` in a process of its own."""
    settings = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home), **environment}
    for variable in ("ORT_DISABLE_TELEMETRY", "CI"):
        settings.pop(variable, None)
    command = [sys.executable, "-c", IMPORT, _extras.__file__, *names]
    subprocess.run(command, env=settings | environment, check=True, capture_output=True)
    return {path.name for path in home.rglob("*") if path.is_file()}


def test_onnxruntime_leaves_no_identifier(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert left_by_importing(tmp_path, "onnxruntime") == set()


def test_what_the_environment_says_about_telemetry_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    _extras._switch_telemetry_off("onnxruntime")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


@pytest.mark.slow
def test_openvino_and_nncf_leave_no_identifier(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    assert not left_by_importing(tmp_path, "openvino", "nncf") & {"openvino_ga_cid", "stats", "openvino_telemetry"}


def test_a_missing_package_is_told_with_the_command_that_installs_it() -> None:
    with pytest.raises(ImportError, match=r"needs nothing_like_it for this; pip install 'slabformer\[vision\]'"):
        _extras.require("nothing_like_it.at_all", extra="vision")
