"""Every recipe of docs/extending.md runs as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
SECTIONS = re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("title", "section"), SECTIONS, ids=[title.replace(" ", "-") for title, _ in SECTIONS])
def test_the_recipe_runs(title: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = CODE.findall(section)
    for library in set(re.findall(r"^ *import (\w+)", code, re.MULTILINE)):
        pytest.importorskip(library, reason="the recipe needs it")
    path = tmp_path / "recipe.py"
    path.write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(f"recipe_{len(title)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # timm looks for the module of what it registers
    spec.loader.exec_module(module)


def test_the_table_at_the_top_lists_every_recipe() -> None:
    head = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    anchors = re.findall(r"\]\(#([\w-]+)\)", head)
    assert anchors == [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title, _ in SECTIONS]
    assert "**Tests**" in SECTIONS[0][1]
    assert all("**Files**" in section and "**Tests**" in section for _, section in SECTIONS)
