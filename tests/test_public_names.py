"""Public names: imported when first used, whatever was imported before, by whichever thread."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import slabformer as sf
from slabformer import _registered
from tolerances import PATIENCE

MODULES = ("ops", "testing")
NAMES = [name for name in sf.__all__ if name not in MODULES]


def run(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_for_type_checkers() -> set[str]:
    (block,) = [node for node in ast.parse(Path(sf.__file__).read_text()).body if isinstance(node, ast.If)]
    return {
        f"{node.module}.{alias.name}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_type_checkers_see_what_is_imported_on_use() -> None:
    assert set(sf.__all__) == {*sf._HOMES, *MODULES}
    homes = {f"{home}.{name}" for name, home in sf._HOMES.items()} | {f"slabformer.{name}" for name in MODULES}
    assert names_for_type_checkers() == homes


def test_importing_is_light_until_a_name_is_used() -> None:
    script = """
import sys, slabformer as sf
assert not {"torch", "timm", "numpy"} & set(sys.modules), "imported at once"
assert set(sf.__all__) <= set(dir(sf)) and not [n for n in dir(sf) if n.startswith("_") and n[:2] != "__"]
assert not hasattr(sf, "nothing")
import slabformer.surgery.fuse, slabformer.surgery.verify
assert callable(sf.fuse) and callable(sf.verify)
assert sf.models.__name__ == "slabformer.models"
namespace = {}
exec("from slabformer import *", namespace)
assert set(sf.__all__) <= set(namespace)
assert "timm" not in sys.modules or "slabformer.models" in sys.modules
print(namespace["fuse"] is sf.fuse is slabformer.surgery.fuse.fuse)
"""
    assert run(script) == "True\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_module_and_survives_pickling(name: str) -> None:
    value = getattr(sf, name)
    assert not isinstance(value, types.ModuleType)
    assert pickle.loads(pickle.dumps(value)) is value


def test_what_is_no_name_is_told_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'slabformer' has no attribute 'fues'"):
        _ = sf.fues


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes a library with a registry, and a module of ours that runs the lines given, in place of torch and timm."""

    def write(ours: str) -> None:
        (tmp_path / "some_library.py").write_text("registry = []\n")
        (tmp_path / "some_of_ours.py").write_text(f"import some_library\n{ours}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(_registered, "REGISTERING", {"some_library": ("some_of_ours",)})
        for name in ("some_library", "some_of_ours"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    return write


REGISTER = "some_library.registry.append('ours')"


def test_ours_are_registered_when_a_library_is_imported_later(library: Callable[[str], None]) -> None:
    library(REGISTER)
    _registered.register_ours()
    assert "some_of_ours" not in sys.modules
    assert importlib.import_module("some_library").registry == ["ours"]


def test_ours_are_registered_at_once_where_a_library_was_imported_before(
    library: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library(REGISTER)
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, _registered.Watch)])
    registry = importlib.import_module("some_library").registry
    assert registry == []
    _registered.register_ours()
    assert registry == ["ours"]


def test_a_library_that_is_too_old_for_us_can_be_imported_all_the_same(library: Callable[[str], None]) -> None:
    library("some_library.not_yet")
    with pytest.warns(UserWarning, match=r"nothing of slabformer is registered with some_library: .*'not_yet'"):
        assert importlib.import_module("some_library").registry == []


PARTS = {
    "some_library": "import time\ntime.sleep(0.2)\nregistry = []\n",
    "ours/__init__": "",
    "ours/room/__init__": "import time\ntime.sleep(0.2)\nimport ours.room.other\n",
    "ours/room/other": "import time\ntime.sleep(0.2)\nimport ours.room.part\n",
    "ours/room/part": "import some_library\nsome_library.registry.append('ours')\npart = True\n",
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow library, and a package of ours that registers with it and takes time to import."""
    for name, text in PARTS.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_registered, "REGISTERING", {"some_library": ("ours.room",)})
    monkeypatch.setattr(_registered, "LIBRARIES", {"room": ("some_library",)})
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ours", "some_library")]:
        monkeypatch.delitem(sys.modules, name)


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns; all begin at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.usefixtures("parts")
def test_threads_may_begin_with_two_modules_of_a_package_that_imports_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registered, "LIBRARIES", {"room": ()})
    monkeypatch.setattr(_registered, "REGISTERING", {})

    def use(name: str, seconds_later: float) -> types.ModuleType:
        time.sleep(seconds_later)  # the package takes 0.2
        return _registered.import_in_turn(name)

    part, other = in_threads(lambda: use("ours.room.part", 0.0), lambda: use("ours.room.other", 0.1))
    assert part.part
    assert other.ours.room.part is part


@pytest.mark.usefixtures("parts")
def test_a_library_is_whole_for_one_thread_while_another_imports_ours() -> None:
    def use_library() -> list[str]:
        return list(importlib.import_module("some_library").registry)

    def use_ours() -> object:
        time.sleep(0.1)  # the library takes twice as long
        return _registered.import_in_turn("ours.room.part")

    assert in_threads(use_library, use_ours)[0] == ["ours"]


@pytest.mark.usefixtures("parts")
def test_a_turn_that_does_not_come_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registered, "PATIENCE_SECONDS", 0.01)
    with _registered._in_turn():
        (module,) = in_threads(lambda: _registered.import_in_turn("ours.room.part"))
    assert module.part


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "import timm\n", "import slabformer.models.registry\n"])
def test_timm_knows_the_zoo_and_threads_may_begin_together(before: str) -> None:
    pytest.importorskip("timm")
    script = f"""
{before}import threading, slabformer as sf
start, found = threading.Barrier(4), []
def use(name):
    start.wait()
    if name == "timm":
        import timm
        found.append(timm.create_model("slab_deit_tiny") is not None)
    else:
        found.append(callable(getattr(sf, name)))
threads = [threading.Thread(target=use, args=(name,)) for name in ("timm", "fuse", "deploy", "load_published")]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(found)
"""
    assert run(script) == "[True, True, True, True]\n"
