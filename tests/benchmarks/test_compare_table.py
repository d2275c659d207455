"""The comparison's pictures: which rows belong together."""

from __future__ import annotations

from pathlib import Path

from compare_table import COLOURS, _swept, draw


def rows(model: str, size: int, batch_size: int) -> list[dict[str, str]]:
    same = {"model": model, "size": str(size), "batch_size": str(batch_size)}
    return [
        same | {"form": form, "p50_ms": str(size + place), "images_per_s": "8.0", "over_baseline": "1.5"}
        for place, form in enumerate(COLOURS)
    ]


def test_a_sweep_is_over_one_batch_size() -> None:
    swept = rows("deit", 224, 1) + rows("deit", 512, 1)
    assert _swept([*rows("deit", 224, 8), *swept, *rows("swin", 224, 1)]) == swept


def test_a_picture_of_sizes_is_drawn_where_there_is_a_sweep(tmp_path: Path) -> None:
    alone = rows("deit", 224, 8) + rows("deit", 224, 1)
    assert [path.name for path in draw(alone, tmp_path)] == ["compare.png"]
    assert [path.name for path in draw(alone + rows("deit", 512, 1), tmp_path)] == ["compare.png", "resolution.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("compare.png", "resolution.png"))
