"""Files that are complete or absent, alone and in pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from slabformer.tasks.engine.files import replaced_with


def write(folder: Path, text: str, with_companion: bool, fail: bool = False) -> None:
    with replaced_with(folder / "model", folder / "model.data") as temporary:
        temporary.write_text(text)
        if with_companion:
            temporary.with_name("model.data").write_text(text)
        if fail:
            raise RuntimeError("on the way")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_pair_appears_together_and_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, "one", with_companion=True)
    assert contents(tmp_path) == {"model": "one", "model.data": "one"}
    write(tmp_path, "two", with_companion=False)
    assert contents(tmp_path) == {"model": "two"}
    write(tmp_path, "three", with_companion=True)
    assert contents(tmp_path) == {"model": "three", "model.data": "three"}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, "one", with_companion=True)
    with pytest.raises(RuntimeError, match="on the way"):
        write(tmp_path, "two", with_companion=True, fail=True)
    assert contents(tmp_path) == {"model": "one", "model.data": "one"}


def test_a_crash_between_the_two_leaves_no_pair_that_does_not_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "one", with_companion=True)

    def die(source: Path, target: Path) -> None:
        raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(OSError, match="no power"):
            write(tmp_path, "two", with_companion=True)
    assert "model" not in contents(tmp_path)
