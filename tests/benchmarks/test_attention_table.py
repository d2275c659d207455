from __future__ import annotations

import pytest
from attention_table import Row, crossover, draw, findings, markdown, slope


def rows(form: str, milliseconds: dict[int, float]) -> list[Row]:
    where = {"backend": "torch", "backward": False, "batch_size": 1, "num_heads": 3, "head_dim": 32}
    return [
        Row(form=form, num_tokens=N, p50_ms=ms, p90_ms=ms, bytes_per_token=100.0, of_floor=None, **where)
        for N, ms in milliseconds.items()
    ]


@pytest.mark.parametrize("power", [1, 2])
def test_the_slope_is_the_power_of_long_sequences_alone(power):
    measured = rows("linear", {196: 99.0} | {N: 1e-6 * N**power for N in (4096, 8192, 65536)})
    assert slope(measured, "linear") == pytest.approx(power)


def test_one_long_sequence_has_no_slope():
    assert slope(rows("linear", {196: 1.0, 4096: 1.0}), "linear") is None


def test_the_crossover_lies_where_both_lines_meet():
    linear, softmax = {100: 4.0, 400: 4.0, 1600: 4.0}, {100: 2.0, 400: 8.0}
    assert crossover(rows("linear", linear) + rows("softmax", softmax), "linear") == pytest.approx(200)


def test_there_is_no_crossover_where_softmax_is_faster_to_the_end():
    measured = rows("linear", {100: 1.0, 400: 4.0}) + rows("softmax", {100: 2.0, 400: 3.0})
    assert crossover(measured, "linear") is None
    assert findings(measured) == ["linear: not faster than softmax at any length; no slope below 4,096 tokens"]


def test_the_slope_of_a_copy_stands_beside():
    measured = rows("linear", {4096: 1.0, 8192: 2.0}) + rows("copy", {4096: 1.0, 8192: 4.0})
    assert findings(measured)[1:] == ["a copy of as many bytes: time grows as N^2.00"]


def test_the_shortest_length_is_named_where_the_linear_form_always_wins():
    measured = rows("linear", {100: 1.0, 400: 2.0}) + rows("softmax", {100: 2.0, 400: 3.0})
    assert crossover(measured, "linear") == 100


def test_a_table_and_a_picture_are_made(tmp_path):
    measured = rows("linear", {100: 1.0, 400: 2.0}) + rows("softmax", {100: 2.0, 400: 3.0})
    assert "| 400 | linear | torch | 2.000 | 2.000 | 100 | - |" in markdown(measured, "a machine")
    draw(measured, tmp_path / "attention.png", "cpu")
    assert (tmp_path / "attention.png").stat().st_size > 10_000
