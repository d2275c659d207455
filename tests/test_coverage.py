"""The coverage table says what the code does now, on a sample of small models."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

DOCS = Path(__file__).parent.parent / "docs"
SAMPLE = (
    "torch/TransformerEncoder, norm_first=True",
    "transformers/llama",
    "transformers/qwen3",
    "transformers/swinv2",
)
SLOW = ("timm/vision_transformer_relpos", "timm/convnext", "timm/levit", "transformers/swin", "transformers/detr")


@pytest.fixture(scope="module")
def coverage() -> Any:
    pytest.importorskip("transformers", reason="the table is about its models")
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("coverage")
    finally:
        sys.path.remove(str(DOCS))
        sys.modules.pop("coverage")


def counts(row: str) -> list[str]:
    """The cells that do not depend on the machine: all but difference, seconds and speed."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")][:7]


@pytest.mark.parametrize("key", [*SAMPLE, *(pytest.param(key, marks=pytest.mark.slow) for key in SLOW)])
@pytest.mark.filterwarnings("ignore")  # other libraries' own
def test_the_table_is_what_the_code_finds(coverage: Any, key: str) -> None:
    fresh = coverage.table_row(coverage.attempt(coverage.subject_of(key), speed=False))
    rows = [counts(line) for line in (DOCS / "coverage.md").read_text().splitlines() if line.startswith("| ")]
    assert counts(fresh) in rows, "the table is old: run `make coverage`"


def test_the_summary_is_the_sum_of_the_table(coverage: Any) -> None:
    text = (DOCS / "coverage.md").read_text()
    rows = [
        counts(line) for line in text.splitlines() if re.match(r"\| (timm|transformers|torchvision|torch) \|", line)
    ]
    kept = sum(int(row[6]) for row in rows)
    assert f"**{len(rows)} families, {sum(int(row[3]) for row in rows)} norms: " in text
    assert f"{kept} kept" in text
    assert all(int(row[3]) == int(row[4]) + int(row[5]) + int(row[6]) for row in rows)


def test_outputs_that_hardly_vary_are_no_evidence(coverage: Any) -> None:
    with pytest.raises(ValueError, match="the outputs hardly vary"):
        coverage.need_varied(nn.Flatten(), [(torch.ones(1, 2),), (torch.ones(1, 2) + 1e-9,)])


def test_reasons_lose_the_number_of_their_block(coverage: Any) -> None:
    reason = "it is followed by a padded convolution (stages.1.blocks.0.conv1); its output is cast to torch.int32"
    assert coverage.general(reason).endswith("(*.conv1); its output is cast to torch.int32")
