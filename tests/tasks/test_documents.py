"""YAML and JSON of others stay as small as they look."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from slabformer._files import read_text
from slabformer.cli.main import main
from slabformer.tasks.engine.documents import check_yaml, parse_json, parse_yaml, read_json

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"holds more than 100,000 values, its aliases written out \(line 6\)"),
        ("a: &a [1, *a]", r"alias \*a holds itself \(line 1\)"),
        ("[" * 100_000, r"nested deeper than 64 levels \(line 1\)"),
        ("- " * 1000 + "1", "nested deeper than 64 levels"),
        ("x" * (2**22 + 1), "has 4,194,305 characters, at most 4,194,304 are read"),
    ],
    ids=["bomb", "itself", "brackets", "dashes", "long"],
)
def test_yaml_that_becomes_more_than_it_looks_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_yaml(text)


def test_yaml_within_bounds_is_read_as_ever() -> None:
    text = "base: &base {a: 1, b: [x, y]}\nother: {<<: *base, b: *base}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None


def test_deep_json_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200_000)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON \(Expecting"):
        read_json(tmp_path / "a.json")


def test_texts_lose_their_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa".encode())
    assert read_text(tmp_path / "a.txt") == "a"


def test_a_recipe_that_is_a_bomb_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(BOMB)
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "recipe.yaml cannot be read: it holds more than 100,000 values" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_recipe_that_is_a_named_pipe_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    assert main(["train", f"--config={tmp_path / 'recipe.yaml'}"]) == 2
    said = capsys.readouterr().err
    assert "recipe.yaml is a named pipe, not a regular file" in said
    assert said.count("\n") == 1
