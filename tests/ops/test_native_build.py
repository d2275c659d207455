"""What is built in C++: once, for this processor, complete or not at all; and what is said where it cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ops.attention_cases import make_case
from slabformer.ops.native import build
from slabformer.ops.native.linear_attention import native_linear_attention, prepare
from tolerances import assert_close

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
        ({"CXX": "false"}, "false does not build linear_attention.cpp: no output"),
    ],
    ids=["unknown", "none", "fails"],
)
def test_a_compiler_that_is_missing_or_fails_is_named(environment, said, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.BuildError, match=said):
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
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len(list(folder.iterdir())) == 1
