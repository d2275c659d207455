"""Build a C++ file of this folder for the processor at hand, once; later calls and processes load what was built."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
#: by which threads share the work; left out where the compiler has none of it
OPENMP = "-fopenmp"
COMPILERS = ("c++", "g++", "clang++")
#: environment variable that names another folder for what was built
CACHE = "SLABFORMER_CACHE"


class BuildError(RuntimeError):
    """There is no compiler, it does not take the file, or what is there is not to be trusted."""


@functools.cache
def library(source: str, **defines: str | int) -> ctypes.CDLL:
    """The file ``source`` of this folder as a loaded library, built on first use.

    Args:
        source: Its name.
        defines: Macros that it is built with.

    Raises:
        BuildError: If there is no compiler, it fails, or others may have written what lies in the cache.
    """
    target = built(source, (), **defines)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"{target} cannot be loaded ({error}); remove it, and it is built again") from error


def built(source: str, flags: Sequence[str] = (), **defines: str | int) -> Path:
    """The file ``source`` of this folder as a library in the cache, built where it is not there.

    Args:
        source: Its name.
        flags: Of the compiler, besides those of every file.
        defines: Macros that it is built with.

    Raises:
        BuildError: As :func:`library`.
    """
    path = Path(__file__).with_name(source)
    options = [*flags, *(f"-D{name}={value}" for name, value in defines.items())]
    target = _cache_folder() / f"{path.stem}-{_key(path, options)}.so"
    if not target.is_file() and not target.is_symlink():
        _build(path, options, target)
    _check_owned(target)
    return target


def _build(path: Path, options: Sequence[str], target: Path) -> None:
    command = [*compiler(), *FLAGS, arch_flag(), str(path), *options]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        beside = Path(folder) / target.name
        for openmp in ([OPENMP], []):
            done = _run_compiler([*command, *openmp, "-o", str(beside)])
            if done.returncode == 0 and beside.is_file():
                beside.chmod(stat.S_IRWXU)  # whatever the umask, nobody else may write what is run
                beside.replace(target)  # complete or absent, also where several processes build at once
                return
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no output"]
    raise BuildError(f"{_words(compiler())} does not build {path.name}: {lines[0]}")


def _run_compiler(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``command``.

    Raises:
        BuildError: If it is no program.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror}); name a C++ compiler in CXX") from error


def compiler() -> list[str]:
    """The command of the C++ compiler: what the environment's CXX says, else the first that is installed.

    CXX may hold a launcher or options, as for make: ``ccache g++``, ``clang++ -stdlib=libc++``.

    Raises:
        BuildError: If there is none.
    """
    given = os.environ.get("CXX", "").strip()
    try:
        wanted = [shlex.split(given, posix=os.name != "nt")] if given else [[name] for name in COMPILERS]
    except ValueError as error:
        raise BuildError(f"CXX is no command ({error}): {given}") from error
    for name, *options in wanted:
        found = shutil.which(name)
        if found:
            return [found, *options]
    names = ", ".join(words[0] for words in wanted)
    raise BuildError(f"no C++ compiler ({names}); install one, such as g++, or name it in CXX")


def _words(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])


def arch_flag() -> str:
    """What makes the compiler use all that this processor can do."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"


def _key(path: Path, options: Sequence[str]) -> str:
    """Differs where what is built could: homes are shared between machines."""
    command = compiler()
    version = _run_compiler([*command, "--version"]).stdout
    parts = [
        *sources(path.parent),
        path.name,
        *options,
        *FLAGS,
        arch_flag(),
        *command,
        version,
        platform.platform(),
        _processor(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def sources(folder: Path = Path(__file__).parent) -> list[str]:
    """Every file in C++ of ``folder``: they include one another."""
    return [each.read_text() for each in sorted((*folder.glob("*.cpp"), *folder.glob("*.h")))]


def _processor() -> str:
    """What tells this processor's instructions from another's."""
    info = Path("/proc/cpuinfo")
    if sys.platform != "linux" or not info.is_file():
        return platform.processor()
    return next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")


def _cache_folder() -> Path:
    """Where libraries are kept: of this user alone, since they are run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE) or Path(base) / "slabformer")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BuildError(f"{folder} cannot be made ({error.strerror}); name another folder in {CACHE}") from error
    _check_owned(folder)
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} cannot be written; name another folder in {CACHE}")
    return folder


def _check_owned(path: Path) -> None:
    """Refuse a folder or library that anybody but this user may have written: it would be run.

    Raises:
        BuildError: If it belongs to another user, others may write it, or a link stands for a library.
    """
    if os.name == "nt":  # a user's folders are closed to others there, and modes say nothing
        return
    status = path.stat() if path.is_dir() else path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise BuildError(f"{path} is a link, which may lead to anybody's code; remove it, and it is built again")
    if status.st_uid != os.geteuid():
        raise BuildError(f"{path} belongs to another user, who may have put code there; name another folder in {CACHE}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} can be written by others, who may have put code there; empty it and `chmod go-w` it")
