"""The house rules that a parser can check: import arrows, a core that needs torch alone."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "slabformer"
#: rooms that import none of those above them
GROUND = {"_extras", "settings", "_files", "_listing", "_process", "_torch", "_moved"}
CORE = GROUND | {"__init__", "ops", "nn", "progressive", "surgery", "testing"}
ON_CORE = CORE | {"models"}
BELOW = ON_CORE - {"__init__"}
#: from a trained model to what is shipped and shown
LEAVING = {"measure", "export", "quantize", "deployment", "figures", "bench"}

#: room -> the rooms it may import from, besides itself; `__init__` stands for `slabformer` itself
ARROWS = {
    **{room: set() for room in GROUND},
    "_files": {"_listing"},
    "ops": GROUND,
    "nn": GROUND | {"ops"},
    "progressive": GROUND | {"ops", "nn"},
    "surgery": GROUND | {"ops", "nn", "progressive"},
    "testing": GROUND | {"ops", "nn"},
    "models": GROUND | {"ops", "nn"},
    "tasks": ON_CORE,
    "measure": BELOW,
    "export": BELOW | {"measure"},
    "quantize": BELOW | {"measure", "export"},
    "deployment": BELOW | {"measure", "export", "quantize"},
    "figures": BELOW | {"measure"},
    "bench": BELOW | {"measure", "deployment", "figures"},
    "quickstart": ON_CORE | {"tasks"} | LEAVING,
    "cli": ON_CORE | {"tasks", "quickstart"} | LEAVING,
    "__init__": ON_CORE | {"deployment"},
}

#: GPU kernels, which nothing imports before it runs on a GPU
KERNELS = SOURCE / "ops" / "kernels"

FILES = sorted(SOURCE.rglob("*.py"))
FILE_IDS = [str(path.relative_to(SOURCE)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=FILE_IDS)


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported below ``tree``; names taken from `slabformer` itself with their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which room they reach"
            yield from (
                [f"slabformer.{alias.name}" for alias in node.names] if node.module == "slabformer" else [node.module]
            )


def rooms_imported(tree: ast.AST) -> set[str]:
    rooms = set()
    for name in imported_modules(tree):
        package, *rest = name.split(".")
        if package == "slabformer":
            rooms.add(rest[0] if rest and rest[0] in ARROWS else "__init__")
    return rooms


def module_level(tree: ast.Module) -> ast.Module:
    """What runs on import: ``tree`` without function bodies and without `if TYPE_CHECKING` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    return Strip().visit(tree)


def misplaced_arrows(room: str, source: str) -> set[str]:
    return rooms_imported(ast.parse(source)) - {room} - ARROWS[room]


def foreign_libraries(source: str) -> set[str]:
    roots = {name.split(".")[0] for name in imported_modules(module_level(ast.parse(source)))}
    return roots - set(sys.stdlib_module_names) - {"torch", "slabformer"}


@each_file
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    assert room in ARROWS, f"{room} is a new room: give it a row in ARROWS"
    assert misplaced_arrows(room, path.read_text()) == set()


def files_imported(source: str, names: set[str]) -> set[str]:
    """Those of our ``names``, dotted from the package on, that ``source`` imports, wherever in it and if only types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & names or {str(node.module)}
    return found & names


def test_files_do_not_import_each_other_in_circles() -> None:
    sources = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path.read_text() for path in FILES}
    sources = {name.removesuffix(".__init__"): source for name, source in sources.items()}
    imports = {name: files_imported(source, set(sources)) - {name} for name, source in sources.items()}
    assert len(imports["slabformer.cli.bench"]) > 3
    graphlib.TopologicalSorter(imports).prepare()


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in CORE], ids=lambda p: str(p.relative_to(SOURCE)))
def test_core_rooms_import_torch_and_the_standard_library_only(path: Path) -> None:
    assert foreign_libraries(path.read_text()) <= ({"triton"} if KERNELS in path.parents else set())


@pytest.mark.parametrize("path", [p for p in FILES if KERNELS not in p.parents], ids=lambda p: p.stem)
def test_kernels_are_imported_inside_functions_alone(path: Path) -> None:
    at_once = imported_modules(module_level(ast.parse(path.read_text())))
    assert not [name for name in at_once if name.startswith("slabformer.ops.kernels")]


def private_names_of_torch(source: str) -> set[str]:
    """Names below `torch` with a leading underscore that ``source`` imports or reads, and storages' addresses."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else "torch" for a in node.names if _torch(a)
            }
            found |= {alias.name for alias in node.names if _torch(alias)}
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and node.attr in ("_cdata", "_version"):
            found.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in known and all(part.isidentifier() for part in rest):
                found.add(".".join([known[first], *rest]))
    named = {name: name.split(".") for name in found if not name.startswith("torch.ops.")}  # operators' own names
    return {name for name, parts in named.items() if any(p.startswith("_") and not p.startswith("__") for p in parts)}


def _torch(alias: ast.alias) -> bool:
    return alias.name.split(".")[0] == "torch"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "_torch"], ids=lambda p: str(p.relative_to(SOURCE)))
def test_private_names_of_torch_stay_in_one_file(path: Path) -> None:
    assert private_names_of_torch(path.read_text()) == set()


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("import torch\ntorch._C._jit()", {"torch._C._jit", "torch._C"}),
        ("from torch.nn.modules.conv import _ConvNd", {"torch.nn.modules.conv._ConvNd"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch import nn\nnn.modules._x", {"torch.nn.modules._x"}),
        ("x.untyped_storage()._cdata", {"_cdata"}),
        ("import torch\ntorch.ops.aten._int_mm", set()),
        ("import torch\ntorch.nn.__name__", set()),
    ],
)
def test_private_names_are_seen(source: str, private: set[str]) -> None:
    assert private_names_of_torch(source) == private


@pytest.mark.parametrize(
    ("room", "source", "misplaced"),
    [
        ("ops", "from slabformer.nn import RepBN", {"nn"}),
        ("nn", "def f():\n    import slabformer.surgery.fuse", {"surgery"}),
        ("models", "from slabformer import surgery", {"surgery"}),
        ("surgery", "import slabformer as sf", {"__init__"}),
        ("tasks", "from slabformer.deployment import bench", {"deployment"}),
        ("surgery", "from slabformer.nn.repbn import RepBN", set()),
        ("tasks", "from slabformer import fuse", set()),
    ],
    ids=["ops-nn", "inside-function", "room-from-root", "root", "tasks-deployment", "down", "public-name"],
)
def test_arrows_are_seen(room: str, source: str, misplaced: set[str]) -> None:
    assert misplaced_arrows(room, source) == misplaced


@pytest.mark.parametrize(
    ("source", "foreign"),
    [
        ("import numpy as np", {"numpy"}),
        ("try:\n    import timm.layers\nexcept ImportError:\n    timm = None", {"timm"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich", set()),
        ("def f():\n    import safetensors", set()),
    ],
    ids=["plain", "guarded", "types-only", "inside-function"],
)
def test_foreign_libraries_are_seen(source: str, foreign: set[str]) -> None:
    assert foreign_libraries(source) == foreign


def distributions_needed_by(name: str) -> set[str]:
    """``name`` and everything it requires without extras, as normalised distribution names."""
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in needed:
            continue
        needed.add(current)
        try:
            requirements = importlib.metadata.requires(current) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [normalised(text) for text in requirements if "extra ==" not in text]
    return needed


def normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.\-]", requirement, maxsplit=1)[0]).lower()


def test_core_works_where_torch_is_alone() -> None:
    allowed = distributions_needed_by("torch") | {"slabformer", "torch"}
    hidden = [
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not allowed & {normalised(name) for name in distributions}
    ]
    assert {"timm", "numpy", "safetensors", "rich"} <= set(hidden)
    script = (
        "import importlib.util, runpy, sys\n"
        f"hidden = {hidden!r}\n"
        "sys.modules.update(dict.fromkeys(hidden))\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name.split('.')[0] in hidden else find(name, *rest)\n"
        f"runpy.run_path({str(TESTS / 'core_alone.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 norms folded" in done.stdout
