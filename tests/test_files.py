"""Files that are complete or absent, alone and in pairs."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slabformer._files import replaced, replaced_with, write_text
from slabformer._listing import NotRegularError
from slabformer.settings import FileToWrite, check


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


def test_a_full_disk_is_told_with_the_file_whoever_writes_it(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writers: dict[str, Callable[[Path], object]] = {
        "python.txt": lambda path: path.write_text("x" * 10_000),
        "torch.pt": lambda path: torch.save(torch.zeros(10_000), path),
        "model.safetensors": lambda path: save_file({"weight": torch.zeros(10_000)}, path),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        for name, write in writers.items():
            (tmp_path / name).write_text("old")
            with pytest.raises(OSError) as caught, replaced(tmp_path / name) as temporary:
                write(temporary)
            assert caught.value.filename == str(tmp_path / name)
            assert caught.value.errno in (errno.EFBIG, errno.ENOSPC, errno.EIO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == dict.fromkeys(writers, "old")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to(os.devnull)


@pytest.mark.skipif(sys.platform == "win32", reason="has none of these in folders")
@pytest.mark.parametrize("make", [a_pipe, a_socket, a_link_to_a_device, Path.mkdir])
def test_what_is_no_file_is_not_replaced_by_one(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = Path("there")
    make(path)
    before = path.lstat()
    with pytest.raises(NotRegularError, match="there is a"):
        write_text(path, "text")
    with pytest.raises(NotRegularError, match="there is a"), replaced_with(path, Path("there.data")):
        pass
    assert path.lstat() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    with pytest.raises(ValueError, match=r"--output must be a file, (but 'there' is a named|got the folder 'there')"):
        check("--output", path, FileToWrite)


@pytest.mark.parametrize("there", [True, False], ids=["file", "nothing"])
def test_a_link_is_written_through(there: bool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to(Path("disk", "run-1"))
    if there:
        (tmp_path / "disk" / "run-1").write_text("before")
    write_text(tmp_path / "latest", "after")
    assert (tmp_path / "latest").is_symlink()
    assert contents(tmp_path / "disk") == {"run-1": "after"}


def test_a_folder_that_is_missing_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replaced(tmp_path / "missing" / "file.txt"):
        pass
    assert caught.value.filename == str(tmp_path / "missing" / "file.txt")


def test_other_errors_in_writing_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replaced(tmp_path / "file.txt"):
        (tmp_path / "input.txt").read_text()
    assert caught.value.filename == str(tmp_path / "input.txt")
    with pytest.raises(ZeroDivisionError), replaced(tmp_path / "file.txt"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
