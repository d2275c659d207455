"""Speed of writing: every form writes the same text, and ratios are those of the times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from csv_files import csv_rows
from language_models import tokens, trained_looking
from slabformer.bench.decoding import ROOM, Logits, Writer, compare_decoding, without_norms
from slabformer.bench.decoding_report import DecodeReport
from slabformer.nn.controls import repbn_modules
from slabformer.surgery.verify import VerificationError
from slabformer.tasks.language.fusing import fuse_language_model
from tolerances import EXACT, FLOAT32, assert_close

CONTEXT = ROOM + 16


def model(norm: str = "prepbn", seed: int = 0) -> nn.Module:
    return trained_looking(norm, seed, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def report() -> DecodeReport:
    given = model()
    variants = {"LayerNorm baseline": model("rmsnorm"), "as given": given, "fused": fuse_language_model(given)[0]}
    variants["ceiling"] = without_norms(given)
    return compare_decoding(variants, batch_sizes=(1, 3), prompt_tokens=8, compiled=False, seconds=0.05, name="tiny")


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_writer_writes_what_generate_does(static: bool) -> None:
    made = model()
    expected = made.generate(tokens(2, 8), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    writer = Writer(made, tokens(2, 8), static=static)
    with torch.no_grad():
        texts = [writer.read(), *(writer.write().argmax(-1) for _ in range(5))]
    assert_close(torch.cat(texts, 1), expected[:, 8:], EXACT)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_full_cache_goes_back_to_the_prompt(static: bool) -> None:
    made = model()
    writer = Writer(made, tokens(2, 8), static=static)
    with torch.no_grad():
        writer.read()
        first = writer.token
        before = [writer.write().clone() for _ in range(ROOM)]
        writer.token = first
        assert_close(writer.write(), before[0], FLOAT32)


def test_every_form_has_a_row_and_ratios_hang_together(report: DecodeReport) -> None:
    assert [(row.batch_size, row.variant) for row in report.rows] == [
        (batch_size, variant)
        for batch_size in (1, 3)
        for variant in ("LayerNorm baseline", "as given", "fused", "ceiling")
    ]
    for row in report.rows:
        assert row.p50_ms <= row.p90_ms
        assert row.tokens_per_second == pytest.approx(row.batch_size / row.p50_ms * 1e3)
        assert row.prompt_tokens_per_second == pytest.approx(row.batch_size * 8 / row.first_token_ms * 1e3)
    given, ceiling = (report.find(variant, "eager", 1) for variant in ("as given", "ceiling"))
    assert given is not None
    assert ceiling is not None
    assert given.over_given == ceiling.of_ceiling == 1
    assert report.equality is not None
    assert report.equality.max_rel < 1e-4


def test_files_and_table_hold_the_rows(report: DecodeReport, tmp_path: Path) -> None:
    table, values, page = report.write(tmp_path)
    rows = csv_rows(table)
    assert [row["variant"] for row in rows] == [row.variant for row in report.rows]
    assert json.loads(values.read_text())["machine"]["threads"] == report.machine.threads
    assert report.table().row_count == len(report.rows)
    lines = page.read_text().splitlines()
    assert sum(line.startswith(("| 1 |", "| 3 |")) for line in lines) == len(report.rows)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert any("torch" in line and "transformers" in line for line in lines)


def test_the_ceiling_has_no_norm_and_the_model_keeps_its_own() -> None:
    given = model()
    ceiling = without_norms(given)
    assert not repbn_modules(ceiling)
    assert len(repbn_modules(given)) == 5
    assert ceiling.lm_head.weight is given.lm_head.weight
    assert not [
        name for name, module in without_norms(model("rmsnorm")).named_modules() if "RMSNorm" in str(type(module))
    ]


def test_nothing_is_timed_that_computes_something_else() -> None:
    with pytest.raises(VerificationError, match="outputs differ"):
        compare_decoding({"as given": model(), "fused": model(seed=1)}, prompt_tokens=4, seconds=0)


def test_logits_that_are_not_finite_are_refused() -> None:
    made = model()
    with torch.no_grad():
        made.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="tiny gives logits that are not finite"):
        compare_decoding({"as given": made, "fused": made}, prompt_tokens=4, name="tiny")


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt must have 1 to 16 tokens \(64 more are written\), got 17"):
        compare_decoding({"as given": model()}, prompt_tokens=17)


@pytest.mark.slow
def test_a_compiled_writer_writes_the_same() -> None:
    made = model()
    eager, compiled = (Writer(made, tokens(1, 8), static=on, compiled=on) for on in (False, True))
    with torch.no_grad():
        for writer in (eager, compiled):
            writer.read()
        for _ in range(ROOM + 2):
            assert_close(compiled.write(), eager.write(), 1e-4)


def test_logits_need_no_cache() -> None:
    made, ids = model(), tokens()
    with torch.no_grad():
        assert_close(Logits(made)(ids), made(input_ids=ids).logits, FLOAT32)
