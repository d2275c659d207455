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


def test_the_code_in_the_readme_runs() -> None:
    """Both loops as printed, on a small model; what the page leaves to the reader is filled in."""
    pytest.importorskip("timm", reason="the page converts a model of timm")
    fresh, trained = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    small = "timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)"
    for printed, filled in {
        'timm.create_model("vit_small_patch16_224")': small,
        "    ...\n": "    torch.nn.functional.cross_entropy(model(images), labels).backward()\n",
        "    optimizer.step()\n": "    optimizer.step(), optimizer.zero_grad()\n",
        "for images": "optimizer = torch.optim.AdamW(model.parameters())\nfor images",
        "fastest = ": "# ",  # compiles
    }.items():
        assert printed in fresh
        fresh = fresh.replace(printed, filled)
    start = "import timm, torch\nsteps = 4\nloader = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)] * steps"
    end = "example_inputs = inputs = loader[0][0]"
    namespace: dict[str, object] = {}
    exec(compile("\n".join([start, end, fresh, f"model = {small}", trained]), "README.md", "exec"), namespace)
    assert "3 of 3 norms folded" in namespace["report"].summary()
    assert namespace["schedule"].finished
