"""`slab list`."""

from __future__ import annotations

import json

import pytest

from slabformer.cli.main import main
from slabformer.models.published import PUBLISHED


def test_every_published_model_and_ours_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for row in PUBLISHED.values():
        assert row.config in printed
        assert row.model in printed
    assert "slab_deit_micro" in printed


def test_a_row_holds_what_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "slab_deit_tiny", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {
        "model": "slab_deit_tiny",
        "published": "slab_deit_t",
        "top1": 74.3,
        "parameters": 6_198_401,
        "attention": "L",
        "fade": 0.16,
        "weights": "https://github.com/xinghaochen/SLAB/releases/download/ckpts/slab_deit_tiny.pth",
        "available": True,
    }


@pytest.mark.parametrize(
    ("pattern", "models"),
    [
        ("deit_s_prepbn", {"deit_small_prepbn"}),
        ("*_micro", {"deit_micro", "slab_deit_micro"}),
        ("cswin", {"slab_cswin_tiny", "slab_cswin_small"}),
    ],
    ids=["published-name", "pattern", "part"],
)
def test_patterns_match_either_name(pattern: str, models: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", pattern, "--json"]) == 0
    assert {row["model"] for row in json.loads(capsys.readouterr().out)} == models


def test_parameters_of_ours_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "deit_micro", "--json"]) == 0
    rows = {row["model"]: row["parameters"] for row in json.loads(capsys.readouterr().out)}
    assert rows["deit_micro"] == 208_074


def test_no_match_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "slab_dit_tiny"]) == 2
    assert "did you mean 'slab_deit_tiny'?" in capsys.readouterr().err
