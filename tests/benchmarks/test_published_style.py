"""The slow reference of every speed computes what our models do, and what its table says is what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from compare_table import Row, draw, markdown
from published_style import ChannelsFirstRepBN, published_style

import slabformer as sf
from slabformer.nn import RepBN
from slabformer.nn.controls import prepbn_modules

SMALL = {
    "slab_deit_tiny": {"img_size": 64, "embed_dim": 48, "depth": 2},
    "slab_pvt_tiny": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "slab_swin_tiny": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "slab_cswin_tiny": {"img_size": 64, "depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize(("name", "arguments"), SMALL.items(), ids=SMALL)
def test_published_style_computes_the_same(name: str, arguments: dict) -> None:
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    sf.testing.randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    slow = published_style(model.double())
    assert any(isinstance(module, ChannelsFirstRepBN) for module in slow.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = model(images), slow(images)
    assert ours.std() > 0
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)  # published sums are float32
    assert any(isinstance(module, RepBN) for module in model.modules()), "the model itself is left alone"


def row(form: str, size: int) -> dict[str, str]:
    figures = {"p50_ms": 2.0, "p90_ms": 3.0, "images_per_s": 500.0, "memory_mib": None, "over_baseline": 1.25}
    found = Row(
        model="m", size=size, batch_size=1, form=form, over_published=2.0, of_ceiling=0.9, of_floor=0.5, **figures
    )
    where = {"device": "cpu", "threads": "1", "dtype": "float32", "load": "0.1", "versions": "v", "date": "d"}
    return {key: "" if value is None else str(value) for key, value in {**vars(found), **where, "command": "c"}.items()}


def test_the_table_and_the_pictures_hold_every_form(tmp_path: Path) -> None:
    forms = ("published style", "deployed", "baseline compiled", "ceiling")
    rows = [row(form, size) for size in (32, 64) for form in forms]
    text = markdown(rows)
    assert "| m | 64 | 1 | deployed | 2.0 | 3.0 | 500.0 | - | 1.25 | 2.00 | 90% | 50% |" in text
    assert text.count("\n- ") == 1, "rows of one run share its line"
    paths = draw(rows, tmp_path)
    assert [path.name for path in paths] == ["compare.png", "resolution.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
