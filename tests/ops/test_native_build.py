"""What is built in C++: once, for this processor, complete or not at all; and what is said where it cannot be."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from children import ended
from ops.attention_cases import make_case
from slabformer.ops.native import build
from slabformer.ops.native.linear_attention import native_linear_attention, prepare
from tolerances import PATIENCE, assert_close

SIZES = {"D": 16, "E": 16, "Token": "float"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own, and nothing loaded yet."""
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    for cached in (build.library, prepare):
        cached.cache_clear()
    yield tmp_path / "cache"
    for cached in (build.library, prepare):
        cached.cache_clear()


@pytest.mark.usefixtures("_compiler")
def test_a_library_is_built_once_and_loaded_by_other_processes(folder, monkeypatch):
    build.library("linear_attention.cpp", **SIZES)
    (built,) = folder.iterdir()
    written = built.stat().st_mtime_ns
    build.library.cache_clear()
    monkeypatch.setattr(build, "_build", None)
    build.library("linear_attention.cpp", **SIZES)
    assert built.stat().st_mtime_ns == written
    assert [path.suffix for path in folder.iterdir()] == [".so"]


@pytest.mark.usefixtures("_compiler")
def test_every_width_and_dtype_is_a_library_of_its_own(folder):
    build.library("linear_attention.cpp", **SIZES)
    build.library("linear_attention.cpp", **SIZES | {"D": 32})
    build.library("linear_attention.cpp", **SIZES | {"Token": "BFloat16"})
    assert len(list(folder.iterdir())) == 3


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "no-such-compiler"}, r"no C\+\+ compiler \(no-such-compiler\); install one, such as g\+\+"),
        ({"PATH": ""}, r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"),
        ({"CXX": "no-such-launcher g++"}, r"no C\+\+ compiler \(no-such-launcher\)"),
        ({"CXX": "false"}, "false does not build linear_attention.cpp: no output"),
        ({"CXX": "true"}, "true does not build linear_attention.cpp: no output"),
        ({"CXX": "false g++"}, r"false g\+\+ does not build linear_attention.cpp: no output"),
        ({"CXX": "g++ 'half"}, r"CXX is no command \(No closing quotation\): g\+\+ 'half"),
    ],
    ids=["unknown", "none", "no_launcher", "fails", "idle", "launcher_fails", "quotation"],
)
def test_a_compiler_that_is_missing_or_fails_is_named(environment, said, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.BuildError, match=said):
        build.library("linear_attention.cpp", **SIZES)


@pytest.mark.usefixtures("folder")
def test_a_compiler_that_is_no_program_is_named(tmp_path, monkeypatch):
    script = tmp_path / "compiler"
    script.write_bytes(b"\x7fELF of another machine")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(build.BuildError, match=r"compiler cannot be run \(Exec format error\); name a C\+\+ compiler"):
        build.library("linear_attention.cpp", **SIZES)


@pytest.mark.usefixtures("folder", "_compiler")
def test_an_error_of_the_compiler_is_passed_on_and_leaves_nothing(folder):
    with pytest.raises(build.BuildError, match=r"does not build linear_attention.cpp: .*error"):
        build.library("linear_attention.cpp", **SIZES | {"Token": "NoSuchType"})
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "file" / "cache"))
    build.library.cache_clear()
    with pytest.raises(build.BuildError, match=f"name another folder in {build.CACHE}"):
        build.library("linear_attention.cpp", **SIZES)


@pytest.mark.usefixtures("_compiler", "folder")
def test_without_openmp_it_runs_on_one_thread(monkeypatch):
    monkeypatch.setattr(build, "OPENMP", "-fno-such-option")
    case = make_case(grid_size=(7, 5), D=16, table=True, device="cpu")
    with torch.no_grad():
        assert_close(case.through(native_linear_attention), case.expected(), 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler", "folder")
@pytest.mark.skipif(build.arch_flag() != "-march=native", reason="these are names of x86-64 processors")
@pytest.mark.parametrize("arch", ["x86-64", "x86-64-v2", "x86-64-v3"])
@pytest.mark.parametrize("widths", [(16, 16), (64, 64), (48, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shorter_vectors_compute_the_same(arch, widths, dtype, monkeypatch):
    monkeypatch.setattr(build, "arch_flag", lambda: f"-march={arch}")
    D, E = widths
    case = make_case(grid_size=(9, 5), D=D, E=E, table=True, masked=True, kernel_size=5, dtype=dtype, device="cpu")
    with torch.no_grad():
        out = case.through(native_linear_attention)
    assert_close(out, case.expected(), 1e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.usefixtures("_compiler", "folder")
def test_processes_that_build_at_once_do_not_meet(folder):
    code = (
        "from slabformer.ops.native.build import library\n"
        "library('linear_attention.cpp', D=16, E=16, Token='float').linear_attention"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    with ended(running):
        assert [process.wait(timeout=PATIENCE) for process in running] == [0, 0]
    assert len(list(folder.iterdir())) == 1


@pytest.fixture
def launcher(tmp_path):
    """A program that runs the rest of its command, as ccache does, and leaves a note."""
    script = tmp_path / "a launcher"
    script.write_text(f"#!/bin/sh\ntouch '{tmp_path}/launched'\nexec \"$@\"\n")
    script.chmod(0o755)
    return script


@pytest.mark.usefixtures("_compiler", "folder")
def test_the_compiler_may_have_a_launcher_and_options(launcher, monkeypatch):
    plain = build.compiler()
    monkeypatch.setenv("CXX", f"{shlex.quote(str(launcher))} {shlex.join(plain)} -DUNUSED='a b'")
    assert build.compiler() == [str(launcher), *plain, "-DUNUSED=a b"]
    prepare(torch.float32, 16, 16)
    assert launcher.with_name("launched").exists()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(build, "_processor", lambda: "flags: another"),
        lambda patch: patch.setattr(build, "arch_flag", lambda: "-march=another"),
        lambda patch: patch.setattr(build, "FLAGS", (*build.FLAGS, "-g")),
        lambda patch: patch.setattr(platform, "platform", lambda: "another system"),
        lambda patch: patch.setenv("CXX", f"{shlex.join(build.compiler())} -O2"),
    ],
    ids=["processor", "architecture", "flags", "system", "command"],
)
def test_what_was_built_elsewhere_or_otherwise_is_not_loaded(change, monkeypatch):
    source = Path(build.__file__).with_name("linear_attention.cpp")
    before = build._key(source, ["-DD=16"])
    assert before == build._key(source, ["-DD=16"])
    change(monkeypatch)
    assert build._key(source, ["-DD=16"]) != before


@pytest.mark.usefixtures("_compiler")
def test_sources_headers_macros_and_the_version_of_the_compiler_count_too(tmp_path, monkeypatch):
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    script = tmp_path / "compiler"
    keys = set()
    for text, included, macro, version in (
        ("1", "1", "1", "1"),
        ("2", "1", "1", "1"),
        ("1", "2", "1", "1"),
        ("1", "1", "2", "1"),
        ("1", "1", "1", "2"),
    ):
        source.write_text(text)
        header.write_text(included)
        script.write_text(f"#!/bin/sh\necho {version}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        keys.add(build._key(source, [f"-DD={macro}"]))
    assert len(keys) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_the_processor_is_told_by_its_instructions():
    assert build._processor().startswith(("flags", "Features"))


@pytest.fixture
def library(folder, monkeypatch):
    """The cached file, and a way to load it; nothing is compiled."""

    def write(path, macros, target):
        target.touch(mode=0o700)

    monkeypatch.setattr(build, "_build", write)
    monkeypatch.setattr(build, "_key", lambda path, macros: "key")
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: path)

    def load():
        build.library.cache_clear()
        return build.library("linear_attention.cpp")

    return Path(load()), load


@pytest.mark.skipif(os.name == "nt", reason="modes say nothing there")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.chmod(0o770), "linear_attention-key.so can be written by others"),
        (lambda file: file.chmod(0o702), "linear_attention-key.so can be written by others"),
        (lambda file: file.parent.chmod(0o770), "cache can be written by others, .* `chmod go-w` it"),
        (lambda file: file.parent.chmod(0o777), "cache can be written by others"),
        (lambda file: file.symlink_to(file.rename(file.with_name("a"))), "so is a link, which may"),
        (lambda file: file.unlink() or file.symlink_to(file.with_name("nothing")), "so is a link"),
    ],
    ids=["file_of_group", "file_of_all", "folder_of_group", "folder_of_all", "link", "dead_link"],
)
def test_a_library_that_others_may_have_written_is_not_run(library, spoil, said):
    file, load = library
    spoil(file)
    with pytest.raises(build.BuildError, match=said):
        load()


@pytest.mark.skipif(os.name == "nt", reason="nobody to be there")
@pytest.mark.parametrize("whose", ["folder", "file"])
def test_a_library_of_another_user_is_not_run(library, whose, monkeypatch):
    file, load = library
    foreign = file if whose == "file" else file.parent
    stat = Path.stat

    def other_user(path, **options):
        found = stat(path, **options)
        return os.stat_result([*found[:4], found.st_uid + (path == foreign), *found[5:]])

    monkeypatch.setattr(Path, "stat", other_user)
    monkeypatch.setattr(Path, "lstat", lambda path: other_user(path, follow_symlinks=False))
    with pytest.raises(build.BuildError, match=f"{foreign.name} belongs to another user"):
        load()


def test_a_library_that_does_not_load_is_named(library, monkeypatch):
    file, load = library

    def refuse(path):
        raise OSError("file too short")

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    with pytest.raises(build.BuildError, match=rf"{file.name} cannot be loaded \(file too short\); remove it"):
        load()


def test_the_cache_may_be_a_link_to_a_folder_of_ones_own(library, tmp_path):
    file, load = library
    file.parent.rename(tmp_path / "elsewhere")
    file.parent.symlink_to(tmp_path / "elsewhere")
    assert load() == str(file)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.skipif(os.name == "nt", reason="modes say nothing there")
def test_a_loose_umask_does_not_open_what_is_built(folder):
    before = os.umask(0o002)
    try:
        prepare(torch.float32, 16, 16)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o700]
