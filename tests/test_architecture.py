"""The house rules that a parser can check: import arrows, a core that needs torch alone."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tolerances import PATIENCE

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SOURCE = ROOT / "src" / "slabformer"
#: rooms that import none of those above them
GROUND = {
    "_extras",
    "settings",
    "_files",
    "_listing",
    "_locks",
    "_process",
    "_private",
    "_torch",
    "_moved",
    "_registered",
    "_defaults",
    "_detector",
    "_norm_names",
    "_loss_weights",
}
#: private names of packages other than torch
FOREIGN = {"_timm", "_torchvision", "_transformers", "_jsonargparse", "_accelerate"}
CORE = GROUND | {"__init__", "ops", "nn", "progressive", "surgery", "distillation", "testing"}
ON_CORE = CORE | {"models"}
BELOW = ON_CORE - {"__init__"}
#: from a trained model to what is shipped and shown
LEAVING = {"measure", "export", "quantize", "deployment", "figures", "bench"}

#: room -> the rooms it may import from, besides itself; `__init__` stands for `slabformer` itself
ARROWS = {
    **{room: set() for room in GROUND},
    **{room: {"_private"} for room in FOREIGN},
    "_files": {"_listing", "_locks"},
    "_torch": {"_private"},
    "_detector": {"settings"},
    "_norm_names": {"settings"},
    "_loss_weights": {"settings"},
    "ops": GROUND,
    "nn": GROUND | {"ops"},
    "progressive": GROUND | {"ops", "nn"},
    "surgery": GROUND | {"ops", "nn", "progressive"},
    "distillation": GROUND | {"ops", "nn", "progressive", "surgery"},
    "testing": GROUND | {"ops", "nn"},
    "models": GROUND | FOREIGN | {"ops", "nn"},
    "tasks": ON_CORE | FOREIGN,
    "measure": BELOW,
    "export": BELOW | {"measure"},
    "quantize": BELOW | {"measure", "export"},
    "deployment": BELOW | {"measure", "export", "quantize"},
    "figures": BELOW | {"measure"},
    "mindspore": ON_CORE | {"measure", "tasks"},
    "bench": BELOW | {"measure", "deployment", "figures"},
    "quickstart": ON_CORE | {"tasks"} | LEAVING,
    "converting": ON_CORE | {"tasks"} | LEAVING,
    "cli": ON_CORE | FOREIGN | {"tasks", "quickstart", "converting", "mindspore"} | LEAVING,
    "__init__": ON_CORE | {"deployment"},
}

#: package -> the one file that may use its private names, and those of its attributes and hooks that are private
PRIVATE: dict[str, tuple[str, set[str]]] = {
    "torch": ("_torch", {"_cdata", "_version", "_modules", "_parameters", "_buffers", "_forward_hooks"}),
    "timm": ("_timm", {"_pos_embed"}),
    "torchvision": ("_torchvision", set()),
    "transformers": (
        "_transformers",
        {"_init_weights", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_save_checkpoint"},
    ),
    "jsonargparse": ("_jsonargparse", {"_actions", "_typehint", "_format_action_invocation"}),
    "accelerate": ("_accelerate", {"_shared_state", "_reset_state"}),
}
#: what the standard library calls private and documents
DOCUMENTED = {"_asdict", "_exit"}

#: GPU kernels, which nothing imports before it runs on a GPU
KERNELS = SOURCE / "ops" / "kernels"

#: every file of the package, parsed once
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def room_of(path: Path) -> str:
    name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "cli" if name == "__main__" else name  # `python -m slabformer`


def offenders(find: Callable[[Path, ast.Module], Collection[str]]) -> dict[str, Collection[str]]:
    """File -> what ``find`` finds in it, for those in which it finds anything."""
    found = {str(path.relative_to(SOURCE)): find(path, tree) for path, tree in TREES.items()}
    assert len(found) > 200
    return {name: wrong for name, wrong in found.items() if wrong}


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


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """What importing the file imports: outside functions and outside `if TYPE_CHECKING` blocks."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported_modules(node)
        elif isinstance(node, ast.If) and dotted(node.test)[-1:] == ["TYPE_CHECKING"]:
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            waiting += ast.iter_child_nodes(node)


def dotted(node: ast.AST) -> list[str]:
    """``a.b.c`` as its parts; nothing where it is more than names and dots."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def misplaced_arrows(room: str, tree: ast.Module) -> set[str]:
    return rooms_imported(tree) - {room} - ARROWS[room]


def foreign_libraries(tree: ast.Module) -> set[str]:
    roots = {name.split(".")[0] for name in imported_at_once(tree)}
    return roots - set(sys.stdlib_module_names) - {"torch", "slabformer"}


def test_every_room_has_a_row_of_arrows() -> None:
    assert {room_of(path) for path in TREES} == set(ARROWS), "give a new room a row in ARROWS"


def test_imports_point_down() -> None:
    assert offenders(lambda path, tree: misplaced_arrows(room_of(path), tree)) == {}


def imports_between_rooms() -> dict[str, set[str]]:
    """Room -> the rooms that its files import from."""
    found: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        found.setdefault(room_of(path), set()).update(rooms_imported(tree))
    return {room: targets - {room} for room, targets in found.items()}


def test_the_picture_shows_the_rooms_and_their_imports() -> None:
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "docs" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    drawn = house.draw(house.grouped(imports_between_rooms(), GROUND, FOREIGN))
    assert house.PICTURE.read_text(encoding="utf-8") == drawn, "run `python tools/docs/house.py`"
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [room for room in ARROWS if room not in GROUND | FOREIGN and f"`{room}" not in page] == []


def files_imported(tree: ast.Module, names: set[str]) -> set[str]:
    """Those of our ``names``, dotted from the package on, that ``tree`` imports, wherever in it and if only types."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & names or {str(node.module)}
    return found & names


def test_files_do_not_import_each_other_in_circles() -> None:
    trees = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): tree for path, tree in TREES.items()}
    trees = {name.removesuffix(".__init__"): tree for name, tree in trees.items()}
    imports = {name: files_imported(tree, set(trees)) - {name} for name, tree in trees.items()}
    assert len(imports["slabformer.cli.bench"]) > 3
    graphlib.TopologicalSorter(imports).prepare()


def test_core_rooms_import_torch_and_the_standard_library_only() -> None:
    def foreign(path: Path, tree: ast.Module) -> set[str]:
        allowed = {"triton"} if KERNELS in path.parents else set()
        return foreign_libraries(tree) - allowed if room_of(path) in CORE else set()

    assert offenders(foreign) == {}


def test_kernels_are_imported_inside_functions_alone() -> None:
    def kernels(path: Path, tree: ast.Module) -> list[str]:
        at_once = [] if KERNELS in path.parents else imported_at_once(tree)
        return [name for name in at_once if name.startswith("slabformer.ops.kernels")]

    assert offenders(kernels) == {}


def private_names(package: str, tree: ast.Module) -> set[str]:
    """Names below ``package`` with a leading underscore that ``tree`` imports or reads, and its private attributes."""
    known: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    known[alias.asname or package] = alias.name if alias.asname else package
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == package:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        first, *rest = dotted(node) or [""]
        if rest and first in known:
            found.add(".".join([known[first], *rest]))
    parts_of = {name: name.split(".") for name in found if not name.startswith("torch.ops.")}  # operators' own names
    private = {name for name, parts in parts_of.items() if any(map(_is_private, parts))}
    return private | {name for node in ast.walk(tree) for name in _own_names(node) if name in PRIVATE[package][1]}


def foreign_private_names(tree: ast.AST, ours: set[str]) -> set[str]:
    """Private attributes that ``tree`` reads or asks for by name, and private modules, that are none of ``ours``."""
    read, imported = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node)[:1] != ["aten"]:
            read.add(node.attr)
        elif isinstance(node, ast.Call) and dotted(node.func) in (["getattr"], ["hasattr"], ["setattr"], ["delattr"]):
            read |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {part for name in imported_modules(node) for part in name.split(".")}
            imported |= {alias.name for alias in node.names}
    return {name for name in (read | imported) - ours - DOCUMENTED - set(ARROWS) if _is_private(name)}


def names_defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_private_names_of_other_packages_stay_in_files_of_their_own() -> None:
    """Whatever the package: an attribute with an underscore that nothing here defines belongs to somebody else."""
    homes = {SOURCE / f"{home}.py" for home, _ in PRIVATE.values()}
    ours = {name for path, tree in TREES.items() if path not in homes for name in names_defined(tree)}
    found = offenders(lambda path, tree: set() if path in homes else foreign_private_names(tree, ours))
    assert found == {}


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("parser._actions", {"_actions"}),
        ("getattr(action, '_typehint', None)", {"_typehint"}),
        ("from rich._cell_widths import CELL", {"_cell_widths"}),
        ("from rich.cells import _cells", {"_cells"}),
        ("import yaml._yaml", {"_yaml"}),
        ("self._own + aten._unsafe_view + row._asdict() + x.__class__", set()),
        ("from slabformer._torch import HOOKS", set()),
    ],
)
def test_private_names_of_any_package_are_seen(source: str, private: set[str]) -> None:
    assert foreign_private_names(ast.parse(source), {"_own"}) == private


def _is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def _own_names(node: ast.AST) -> Iterator[str]:
    """The attribute that ``node`` reads or writes, or the methods and attributes of the class that it defines."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ClassDef):
        for line in node.body:
            if isinstance(line, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield line.name
            elif isinstance(line, (ast.Assign, ast.AnnAssign)):
                targets = line.targets if isinstance(line, ast.Assign) else [line.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("package", PRIVATE)
def test_private_names_of_a_package_stay_in_one_file(package: str) -> None:
    home = SOURCE / f"{PRIVATE[package][0]}.py"
    assert offenders(lambda path, tree: set() if path == home else private_names(package, tree)) == {}


@pytest.mark.parametrize("package", PRIVATE)
def test_files_of_private_names_say_which_versions_they_were_seen_in(package: str) -> None:
    """From the lower bound of pyproject.toml to what tests are pinned to, and an upper bound ends what is claimed."""
    lowest, newest = importlib.import_module(f"slabformer.{PRIVATE[package][0]}").CHECKED_WITH
    pinned = re.search(rf"^{package}==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    bounds = {str(Requirement(text).specifier) for text in requirements() if Requirement(text).name == package}
    assert pinned is not None
    assert pinned[1] == newest or pinned[1].startswith(f"{newest}.")
    ((low, high),) = (sorted(bound.split(","), reverse=True) for bound in bounds)
    assert (low, high[0]) == (f">={lowest}", "<")


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]


@pytest.mark.parametrize(
    ("package", "source", "private"),
    [
        ("torch", "import torch\ntorch._C._jit()", {"torch._C._jit", "torch._C"}),
        ("torch", "from torch.nn.modules.conv import _ConvNd", {"torch.nn.modules.conv._ConvNd"}),
        ("torch", "import torch._dynamo", {"torch._dynamo"}),
        ("torch", "from torch import nn\nnn.modules._x", {"torch.nn.modules._x"}),
        ("torch", "x.untyped_storage()._cdata", {"_cdata"}),
        ("torch", "import torch\ntorch.ops.aten._int_mm", set()),
        ("torch", "import torch\ntorch.nn.__name__", set()),
        ("timm", "def f():\n    from timm.models._features import x", {"timm.models._features.x"}),
        ("timm", "import timm as t\nt.models._registry.y", {"timm.models._registry", "timm.models._registry.y"}),
        ("transformers", "class M:\n    def _init_weights(self): ...", {"_init_weights"}),
        ("transformers", "class M:\n    _keep_in_fp32_modules = []", {"_keep_in_fp32_modules"}),
    ],
)
def test_private_names_are_seen(package: str, source: str, private: set[str]) -> None:
    assert private_names(package, ast.parse(source)) == private


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
    assert misplaced_arrows(room, ast.parse(source)) == misplaced


@pytest.mark.parametrize(
    ("source", "foreign"),
    [
        ("import numpy as np", {"numpy"}),
        ("try:\n    import timm.layers\nexcept ImportError:\n    timm = None", {"timm"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich\nelse:\n    import yaml", {"yaml"}),
        ("import typing\nif typing.TYPE_CHECKING:\n    import rich", set()),
        ("class C:\n    import rich", {"rich"}),
        ("def f():\n    import safetensors", set()),
    ],
    ids=["plain", "guarded", "types-only", "types-only-dotted", "inside-class", "inside-function"],
)
def test_foreign_libraries_are_seen(source: str, foreign: set[str]) -> None:
    assert foreign_libraries(ast.parse(source)) == foreign


def test_every_test_file_has_a_name_of_its_own() -> None:
    """pytest stops at the second module of one name, though only in a run that collects both."""
    names = sorted(path.name for path in TESTS.rglob("test_*.py"))
    assert names == sorted(set(names))


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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 norms folded" in done.stdout
