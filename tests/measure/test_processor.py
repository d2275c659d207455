"""What the processor can do is read from where Linux says it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from slabformer.measure import processor


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f syscall\n", ("avx2", "avx512f", "sse4_2")),
        ("Features\t: fp asimd bf16 crc32\n", ("asimd", "bf16")),
        ("nothing\n", ()),
    ],
    ids=["x86", "arm", "neither"],
)
def test_instructions_are_those_that_compilers_choose_by(
    text: str, found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    assert processor.instructions() == found


def test_a_system_that_does_not_tell_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "absent")
    assert processor.instructions() == ()


@pytest.mark.parametrize(("spelled", "name"), [("AMD64", "x86_64"), ("aarch64", "arm64"), ("x86_64", "x86_64")])
def test_one_architecture_has_one_name(spelled: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: spelled)
    assert processor.architecture() == name
