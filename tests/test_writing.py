"""Files are written in one way: complete or not at all."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from slabformer import _files
from slabformer._files import as_json, write_csv, write_json

SOURCE = Path(_files.__file__).parent
#: blocks that put a file in its place when it is complete
WHOLE = {"replaced", "replaced_folder", "replaced_with", "workspace"}
#: what may write otherwise, and why
OTHERWISE = {
    "deployment/targets/aot_inductor.py": "inside a folder that appears when it is complete",
    "deployment/targets/executorch.py": "inside a folder that appears when it is complete",
    "deployment/targets/torch_export.py": "inside a folder that appears when it is complete",
    "export/model.py": "the caller replaces the file when it has been compared with PyTorch",
    "measure/timing.py": "a switch of the kernel in /proc",
    "models/weights/download.py": "a download goes on where it broke off",
    "tasks/detection/digits.py": "inside a folder that appears when it is complete",
    "tasks/engine/checkpoint.py": "inside a folder that appears when it is complete",
    "tasks/engine/observers.py": "rows that a run adds; half a line is left out when they are read",
}


def writes(source: str) -> Iterator[ast.Call]:
    """Calls that write a file outside the blocks that make it whole."""

    def visit(node: ast.AST) -> Iterator[ast.Call]:
        if isinstance(node, ast.With) and any(_name(item.context_expr) in WHOLE for item in node.items):
            return
        if isinstance(node, ast.Call) and (_name(node) in ("write_bytes", "savefig", "copyfile") or _opens(node)):
            yield node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write_text":
            yield node
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(ast.parse(source))


def _name(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _opens(call: ast.Call) -> bool:
    modes = [each.value for each in ast.walk(call) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return _name(call) == "open" and any(set(mode) & set("wax") and set(mode) <= set("wax+bt") for mode in modes)


def test_no_module_writes_a_file_in_a_way_of_its_own() -> None:
    found = {}
    for path in SOURCE.rglob("*.py"):
        calls = [ast.unparse(call) for call in writes(path.read_text())]
        found[path.relative_to(SOURCE).as_posix()] = [call for call in calls if "(buffer" not in call]
    assert {name for name, calls in found.items() if calls} == set(OTHERWISE), found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("path.write_text('x')", 1),
        ("with path.open('w') as file: pass", 1),
        ("open(path, mode='wb')", 1),
        ("with replaced(path) as new, new.open('w') as file: pass", 0),
        ("path.open()\nopen(path, 'rb')", 0),
        ("write_text(path, 'x')", 0),
    ],
)
def test_ways_to_write_are_seen(source: str, count: int) -> None:
    assert len(list(writes(source))) == count


def test_a_report_that_cannot_be_made_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    write_csv(path, [{"a": 1}], ["a", "b"])
    assert path.read_text() == "a,b\n1,\n"
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_csv(path, [{"a": 2}, {"c": 3}], ["a", "b"])
    assert path.read_text() == "a,b\n1,\n"
    assert list(tmp_path.iterdir()) == [path]


def test_json_holds_names_that_are_no_text(tmp_path: Path) -> None:
    name = b"gr\xfcn.jpg".decode(errors="surrogateescape")
    write_json(tmp_path / "found.json", {"ä": name})
    text = (tmp_path / "found.json").read_text(encoding="utf-8")
    assert "ä" in text
    assert json.loads(text) == {"ä": name} == json.loads(as_json({"ä": name}))
