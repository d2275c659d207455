"""`slab list`."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from slabformer.cli.list import registered
from slabformer.cli.main import main
from slabformer.models.weights.published import BY_MODEL, PUBLISHED


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["list", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_published_model_and_ours_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for row in PUBLISHED.values():
        assert row.config in printed
        assert row.model in printed
    assert "slab_deit_micro" in printed


def test_a_row_holds_what_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = listed(capsys, "slab_deit_tiny")
    assert row == {
        "model": "slab_deit_tiny",
        "family": "deit",
        "published": "slab_deit_t",
        "top1": 74.3,
        "parameters": 6_198_401,
        "deployed_parameters": None,
        "macs": None,
        "deployed_macs": None,
        "attention": "L",
        "fade": 0.16,
        "weights": "https://github.com/xinghaochen/SLAB/releases/download/ckpts/slab_deit_tiny.pth",
        "baseline": "deit_tiny_patch16_224",
    }


@pytest.mark.parametrize(
    ("pattern", "models"),
    [
        ("deit_s_prepbn", {"deit_small_prepbn"}),
        ("*deit_micro", {"deit_micro", "slab_deit_micro"}),
        ("slab_cswin", {"slab_cswin_tiny", "slab_cswin_small"}),
    ],
    ids=["published-name", "pattern", "part"],
)
def test_patterns_match_either_name(pattern: str, models: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["model"] for row in listed(capsys, pattern)} == models


@pytest.mark.parametrize(
    ("arguments", "field", "values"),
    [
        (["--family", "swin"], "family", {"swin"}),
        (["--attention", "llss"], "attention", {"LLSS"}),
        (["--attention", "L*"], "attention", {"L", "LLLL", "LLSS"}),
    ],
    ids=["family", "plan", "plan-pattern"],
)
def test_filters_keep_what_they_name(
    arguments: list[str], field: str, values: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = listed(capsys, *arguments)
    assert {row[field] for row in rows} == values
    assert len(rows) < len(registered())


def test_released_weights_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["model"] for row in listed(capsys, "--weights")} == {row.model for row in BY_MODEL.values() if row.file}


def test_costs_of_both_forms_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = listed(capsys, "slab_deit_micro", "--macs")
    assert (row["parameters"], row["deployed_parameters"]) == (228_819, 226_506)
    assert row["macs"] == row["deployed_macs"] == 14_238_336


@pytest.mark.parametrize("name", sorted(name for name in BY_MODEL if timm.is_model(name)))
def test_the_table_tells_the_plan_and_the_parameters_of_what_is_built(name: str) -> None:
    row = BY_MODEL[name]
    with torch.device("meta"):
        model = timm.create_model(name, norm=row.norm)
    assert getattr(model, "attention", row.attention) == row.attention
    # published files hold parameters that nothing reads: class tokens, and scales of CSWin's attention
    unread = {"slab_deit_tiny": 192, "slab_deit_small": 384, "slab_cswin_tiny": 640, "slab_cswin_small": 640}
    if row.num_params is not None:
        assert sum(p.numel() for p in model.parameters()) + unread.get(name, 0) == row.num_params


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slab_dit_tiny"], "did you mean 'slab_deit_tiny'?"),
        (["slab_deit", "--family", "swin"], "no model passes these filters; 'slab_deit' are of deit"),
    ],
    ids=["pattern", "filters"],
)
def test_no_match_says_what_there_is(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *arguments]) == 2
    assert message in capsys.readouterr().err
