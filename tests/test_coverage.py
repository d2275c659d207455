"""The coverage table says what the code does now, on a sample of small models."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusing import net, norm, tokens

DOCS = Path(__file__).parent.parent / "docs"
SCRIPTS = DOCS.parent / "tools" / "docs"
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
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("coverage")
    finally:
        sys.path.remove(str(SCRIPTS))
        sys.modules.pop("coverage")


def counts(row: str) -> list[str]:
    """The cells that do not depend on the machine."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")][:7]


@pytest.mark.parametrize("key", [*SAMPLE, *(pytest.param(key, marks=pytest.mark.slow) for key in SLOW)])
@pytest.mark.filterwarnings("ignore")  # other libraries' own
def test_the_table_is_what_the_code_finds(coverage: Any, key: str) -> None:
    fresh = coverage.table_row(coverage.attempt(coverage.subject_of(key)))
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


PLACES = {
    "linears": (lambda m, x: (m.linear(m.norm(x).roll(1, 1)), m.conv(m.norm(x).mT)), True),
    "tokens mixed": (lambda m, x: m.mix(m.norm(x).mT), True),
    "padded tokens": (lambda m, x: m.linear(F.pad(m.norm(x), (0, 0, 0, 2))), True),
    "residual": (lambda m, x: m.linear(m.norm(x)) + m.norm(x), False),
    "padded convolution": (lambda m, x: m.padded(m.norm(x).mT), False),
    "output": (lambda m, x: (m.linear(m.norm(x)), m.norm(x)), False),
}


@pytest.mark.parametrize(("forward", "expected"), PLACES.values(), ids=PLACES)
def test_what_reads_a_norm_decides_whether_it_is_pre_norm(coverage: Any, forward: Any, expected: bool) -> None:
    conv, padded = nn.Conv1d(6, 6, 2), nn.Conv1d(6, 6, 3, padding=1)
    model = net(forward, norm=norm(), linear=nn.Linear(6, 6), mix=nn.Linear(4, 4), conv=conv, padded=padded)
    assert coverage.pre_norms(model, (tokens(2, 4, 6),), {}) == ({"norm"} if expected else set())


def test_kept_norms_are_grouped_by_reason_and_place(coverage: Any) -> None:
    kept = [coverage.NormOutcome(f"blocks.{i}.norm{i % 2}", "kept", reason="it is last") for i in range(3)]
    groups = [(group.name, group.count, group.pre_norm) for group in coverage.grouped(kept, {"blocks.1.norm1"})]
    assert groups == [("*.norm0", 2, False), ("*.norm1", 1, True)]


def test_a_row_is_the_same_after_json(coverage: Any) -> None:
    row = coverage.Row(
        "timm", "vit", "vit", norms=3, forward=2, pre_norms=3, kept=(coverage.Kept("norm", 1, True, "late"),)
    )
    assert coverage.Row.of(json.loads(json.dumps(asdict(row)))) == row
    assert "| 3 | 2 | 0 | 1 | 2/3 |" in coverage.table_row(row)


@pytest.mark.filterwarnings("ignore")  # other libraries' own
def test_the_page_is_made_by_one_call_and_goes_on_where_it_stopped(
    coverage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = "torch/TransformerEncoder, norm_first=True"
    monkeypatch.setattr(coverage, "PAGE", tmp_path / "coverage.md")
    monkeypatch.setattr(coverage, "STATE", tmp_path / "coverage.json")
    coverage.main(["--only", f"^{subject}$"])
    (row,) = (line for line in (tmp_path / "coverage.md").read_text().splitlines() if line.startswith("| torch |"))
    assert counts(row)[3:] == ["5", "4", "0", "1"]
    monkeypatch.setattr(coverage, "attempt", lambda *_: pytest.fail("measured again"))
    coverage.main(["--only", f"^{subject}$"])


def test_rows_are_measured_again_with_other_code(coverage: Any) -> None:
    row = asdict(coverage.Row("timm", "vit", "vit", norms=1))
    version = coverage.code_version()
    assert coverage.is_done({"version": version, "row": row}, version, 0)
    assert not coverage.is_done({"version": "older", "row": row}, version, 0)
    assert len(version.split()) == 5


def test_the_code_that_a_row_depends_on_is_all_there(coverage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    own = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or own(path))
    coverage.code_version()
    assert {"coverage_places.py", "decide.py", "affine.py", "prepbn.py"} <= set(read)
