"""What the documentation says about the code is what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import slabformer as sf

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
def test_models_page_is_generated() -> None:
    pytest.importorskip("timm", reason="the page lists models that timm holds")
    spec = importlib.util.spec_from_file_location("generate", ROOT / "tools" / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "models.md").read_text() == generate.models_page(), "run `python tools/docs/generate.py`"


def test_models_page_names_every_model() -> None:
    timm = pytest.importorskip("timm", reason="the page lists models that timm holds")
    page = (ROOT / "docs" / "models.md").read_text()
    ours = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("slabformer.")]
    missing = [name for name in ours if f"| `{name}` |" not in page]
    assert not missing, "run `python tools/docs/generate.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()) + re.findall(
        r'src="(?!https?:)([^"]+)', page.read_text()
    )
    broken = [target for target in targets if not (page.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_public_names_in_prose_exist(page: Path) -> None:
    unknown = {name for name in re.findall(r"\bsf\.(\w+)", page.read_text()) if not hasattr(sf, name)}
    assert not unknown


def test_the_page_about_trained_models_runs() -> None:
    """From its first line to its last, on the small model that it makes."""
    pytest.importorskip("timm", reason="the page converts a model of timm")
    code = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "converting.md").read_text(), re.MULTILINE | re.DOTALL
    )
    namespace: dict[str, object] = {}
    exec(compile("\n".join(code), "converting.md", "exec"), namespace)
    assert "norms folded" in namespace["outcome"].summary()
    assert set(namespace["order"]) == set(namespace["report"].plan.take)
    assert set(namespace["names"]) == set(namespace["attentions"].plan.take)
