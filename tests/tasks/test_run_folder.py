"""A run's folder belongs to one process at a time, and what a run did not write is never deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from slabformer import _files
from slabformer._files import sweep, workspace, write_text
from slabformer._locks import acquire
from slabformer.tasks.classification.train import train
from slabformer.tasks.engine.checkpoint import CheckpointStore
from slabformer.tasks.engine.folder import FolderInUseError, RunFolder
from tiny_training import tiny_config

CONFIG = {"output": "run", "resume": "auto", "overwrite": False, "save_every": 0, "seed": 1}

#: holds what it is told to, says so, and waits to be killed; without the package, whose import takes seconds
HOLD = """
import json, os, runpy, socket, sys, time
from pathlib import Path
files, what, path = runpy.run_path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
if what == "folder":
    path.mkdir(exist_ok=True)
    files["acquire"](path / ".run.lock").write(
        json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": "2026-01-01 00:00:00"})
    )
else:
    block = files["workspace"](path)
    (block.__enter__() / "model.onnx").write_text("half")
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held(what: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the run's folder ``path``, or has a workspace in it."""
    command = [sys.executable, "-c", HOLD, _files.__file__, what, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def listed(folder: Path) -> set[str]:
    return set(json.loads((folder / "manifest.json").read_text())["files"])


def run_in(path: Path, **changes: Any) -> RunFolder:
    return RunFolder(path, {**CONFIG, **changes}, {"overwrite"})


def test_a_second_process_is_refused_in_one_line_and_let_in_once_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with held("folder", path) as process:
        for attempt in (run_in(path).refuse_if_taken, run_in(path).claimed().__enter__):
            with pytest.raises(FolderInUseError) as refused:
                attempt()
            message = str(refused.value)
            assert message.startswith(f"{path} is in use by process {process.pid} on ")
            assert message.endswith("; wait until it ends, or choose another output folder")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (path / ".run.lock").exists()
        run_in(path).refuse_if_taken()
        with run_in(path).claimed():
            pass
    assert names(path) == {"config.yaml", "manifest.json"}


def test_a_folder_is_not_claimed_twice_in_a_process_and_is_free_afterwards(tmp_path: Path) -> None:
    with run_in(tmp_path).claimed(), pytest.raises(FolderInUseError), run_in(tmp_path).claimed():
        pass
    with pytest.raises(ZeroDivisionError), run_in(tmp_path).claimed():
        raise ZeroDivisionError
    with run_in(tmp_path).claimed():
        pass


def test_training_is_refused_while_another_process_trains_there(tmp_path: Path) -> None:
    with held("folder", tmp_path / "run"), pytest.raises(FolderInUseError):
        train(tiny_config(tmp_path / "run", overwrite=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    lock = acquire(tmp_path / "lock")
    assert lock is not None
    (wait, go), (ready, tell) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        os.read(wait, 1)  # outlives its parent
        os._exit(0)
    os.read(ready, 1)
    os.close(lock._descriptor)  # as when the parent is killed
    again = acquire(tmp_path / "lock")
    os.write(go, b"x")
    os.waitpid(child, 0)
    assert again is not None
    again.release(delete=True)
    assert names(tmp_path) == set()


def test_what_a_killed_process_left_is_swept_and_a_live_ones_is_not(tmp_path: Path) -> None:
    with held("workspace", tmp_path) as process:
        sweep(tmp_path)
        (left,) = tmp_path.iterdir()
        assert (left / "model.onnx").read_text() == "half"
        process.kill()
        process.wait()
        assert left.exists()
        write_text(tmp_path / "other.txt", "whole")  # the next file that is written there
    assert names(tmp_path) == {"other.txt"}


def test_a_workspace_of_another_host_is_swept_when_it_has_not_changed_for_an_hour(tmp_path: Path) -> None:
    place = tmp_path / ".slabformer-0123456789abcdef.part"
    place.mkdir()
    (place / "owner.lock").write_text("elsewhere")
    (place / "model.onnx").write_text("half")
    sweep(tmp_path)
    assert place.exists()
    for name in ("owner.lock", "model.onnx"):
        os.utime(place / name, (1.0, 1.0))
    sweep(tmp_path)
    assert not place.exists()


def test_sweeping_leaves_what_only_looks_like_ours(tmp_path: Path) -> None:
    for name in (".slabformer-mine.part", ".slabformer-0123456789abcdef.part.d", ".model-abcdefgh"):
        (tmp_path / name).mkdir()
    (tmp_path / ".slabformer-0123456789abcdef.part").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".slabformer-0123456789abcdea.part").symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before
    sweep(tmp_path / "missing")


def test_workspaces_of_one_process_do_not_meet(tmp_path: Path) -> None:
    with workspace(tmp_path) as first, workspace(tmp_path) as second:
        assert first != second
        assert first.exists()
    assert names(tmp_path) == set()


def test_overwrite_deletes_what_the_manifest_lists_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(run, epochs=2))
    assert listed(run) == names(run)
    mine = {"notes.txt", "results.csv", "teacher.safetensors", "events.out.tfevents.1"}
    for name in mine:
        (run / name).write_text("mine")
    (run / "checkpoint-7").mkdir()
    train(tiny_config(run, epochs=2, seed=5, overwrite=True, ema=tiny_config(run).ema))
    assert all((run / name).read_text() == "mine" for name in mine)
    assert (run / "checkpoint-7").is_dir()
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 5


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "metrics.csv", "result.json", "config.yaml", "manifest.json", "checkpoint-9.pt"]
)
def test_a_file_of_the_users_is_neither_deleted_nor_written_over(name: str, overwrite: bool, tmp_path: Path) -> None:
    if name == "model.safetensors":
        save_file({"weight": torch.ones(2)}, tmp_path / name)
    else:
        (tmp_path / name).write_text('{"mine": 1}')
    before = (tmp_path / name).read_bytes()
    with pytest.raises((ValueError, RuntimeError), match=name.replace(".", r"\.")):
        run_in(tmp_path).claimed(overwrite).__enter__()
    assert (tmp_path / name).read_bytes() == before
    assert names(tmp_path) == {name}


def test_a_run_without_a_manifest_is_known_by_its_recipe_and_its_exact_names(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    CheckpointStore(tmp_path).save(3, {"position": 1})
    old = ("metrics.csv", "steps.csv", "model.safetensors", ".model-a1b2c3d4", ".config.yaml.part")
    for name in (*old, "data.csv", "other.safetensors"):
        (tmp_path / name).write_text("")
    with run_in(tmp_path, seed=2).claimed(overwrite=True):
        assert names(tmp_path) == {
            "config.yaml",
            "manifest.json",
            "data.csv",
            "other.safetensors",
            ".run.lock",
            *old[3:],
        }


def test_what_older_versions_left_half_written_is_swept_from_a_run_of_theirs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / ".model-a1b2c3d4").mkdir()
    (tmp_path / ".checkpoint-3.pt.part").write_text("half")
    (tmp_path / ".hidden").write_text("mine")
    with run_in(tmp_path).claimed():
        pass
    assert names(tmp_path) == {"config.yaml", "manifest.json", ".hidden"}


def test_a_kill_while_the_run_is_deleted_leaves_the_rest_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_in(tmp_path).claimed():
        run_in(tmp_path).record("steps.csv", "metrics.csv")
        for name in ("steps.csv", "metrics.csv"):
            (tmp_path / name).write_text("")
    unlink = Path.unlink

    def die(path: Path, **options: Any) -> None:
        if path.name == "steps.csv":
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path).claimed(overwrite=True).__enter__()
    assert "steps.csv" in listed(tmp_path)


@pytest.mark.parametrize("entry", ["../outside.txt", "/etc/passwd", "a/b", "..", 7], ids=str)
def test_a_manifest_that_names_files_elsewhere_is_refused(entry: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "outside.txt").write_text("mine")
    manifest = {"writer": "run", "files": [entry]}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is not the list of what a run wrote"):
        run_in(tmp_path / "run").claimed(overwrite=True).__enter__()
    assert (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("text", ["seed: [", "just text", "\x00\x01"], ids=["cut", "text", "binary"])
def test_a_damaged_recipe_is_told_by_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        run_in(tmp_path).look()
