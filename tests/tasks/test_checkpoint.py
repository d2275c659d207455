"""A checkpoint file is complete, or it is not there, or it says that it is damaged."""

from __future__ import annotations

import errno
import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slabformer import _files as files
from slabformer.tasks.engine.checkpoint import (
    HEADER_LENGTH,
    CheckpointStore,
    DamagedCheckpointError,
    read_checkpoint,
    write_checkpoint,
)

STATE = {"model": {"weight": torch.arange(100.0)}, "position": {"step": 3}, "best": 0.5}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "checkpoint-3.pt"
    write_checkpoint(path, STATE)
    return path


def test_what_is_written_is_read(written: Path) -> None:
    state = read_checkpoint(written)
    assert state.keys() == STATE.keys()
    assert torch.equal(state["model"]["weight"], torch.arange(100.0))
    assert state["position"] == {"step": 3}


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_altered_byte_is_found(written: Path, place: float, mask: int) -> None:
    data = bytearray(written.read_bytes())
    data[int(place * len(data))] ^= mask
    damaged = written.with_name("damaged.pt")
    damaged.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=r"damaged\.pt is truncated or altered"):
        read_checkpoint(damaged)


@settings(max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_found(written: Path, share: float) -> None:
    data = written.read_bytes()
    damaged = written.with_name("truncated.pt")
    damaged.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(damaged)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    write_checkpoint(tmp_path / "checkpoint-1.pt", {"model": Evil()})
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-1.pt holds other things .*[Ww]eights.only"):
        read_checkpoint(tmp_path / "checkpoint-1.pt")
    assert not (tmp_path / "ran").exists()


def test_the_last_few_are_kept_newest_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 9, 10, 100):
        store.save(step, {**STATE, "position": {"step": step}})
    assert [path.name for path in store.paths()] == ["checkpoint-100.pt", "checkpoint-10.pt"]
    found = store.load_latest()
    assert found is not None
    assert found[1]["position"] == {"step": 100}


def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, STATE)
    store.save(2, STATE)
    (tmp_path / "checkpoint-2.pt").write_bytes(b"short")
    with caplog.at_level(logging.WARNING):
        found = store.load_latest()
    assert found is not None
    assert found[0].name == "checkpoint-1.pt"
    assert "checkpoint-2.pt is truncated or altered" in caplog.text


def test_nothing_but_damaged_ones_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2.pt").write_bytes(bytes(HEADER_LENGTH + 10))
    with pytest.raises(DamagedCheckpointError, match=r"every checkpoint .* damaged; start again"):
        CheckpointStore(tmp_path).load_latest()


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path).load_latest() is None
    assert CheckpointStore(tmp_path / "missing").load_latest() is None


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = CheckpointStore(tmp_path)
    store.save(1, STATE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-2") as caught:
            store.save(2, {"model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1.pt"]


def test_the_contents_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("sync_file", "sync_folder"):
        monkeypatch.setattr(files, name, lambda path, name=name: calls.append(name))
    rename = files.os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("replace"), rename(*paths)))
    write_checkpoint(tmp_path / "checkpoint-1.pt", STATE)
    assert calls == ["sync_file", "replace", "sync_folder"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "cannot be encoded: \ud800")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"
