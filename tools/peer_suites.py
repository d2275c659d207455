"""Run timm's and transformers' own test suites on our models: `python tools/peer_suites.py timm -k slab_swin_tiny`.

The test files are not in the wheels. They come from a checkout of the installed version's tag (`--sources`), or from
its source distribution, which pip fetches into `build/peers`. Nothing of theirs is kept in this repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "peers"
#: the test file that is run, in the sources or here
SUITES = {"timm": "tests/test_models.py", "transformers": str(HERE / "suites" / "test_slab_llama.py")}
#: what the suites import beyond this project's own requirements
NEEDED = {"timm": (), "transformers": ("parameterized",)}


def unpacked_sdist(package: str) -> Path:
    """Folder of the source distribution of the installed ``package``, fetched if it is not there."""
    name = f"{package}-{version(package)}"
    folder = BUILD / name
    if not folder.is_dir():
        pip("download", "--no-binary", package, "--no-deps", "--dest", str(BUILD), f"{package}=={version(package)}")
        with tarfile.open(BUILD / f"{name}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    return folder


def pip(*arguments: str) -> None:
    """Run pip.

    Raises:
        SystemExit: If it fails.
    """
    if subprocess.run([sys.executable, "-m", "pip", *arguments], check=False).returncode:
        raise SystemExit(f"pip {arguments[0]} failed; give a checkout of the installed version with --sources")


def site_of(package: str) -> Path:
    """Folder with what the suite needs and this environment lacks."""
    site = BUILD / "site"
    for name in NEEDED[package]:
        if importlib.util.find_spec(name) is None and not (site / name).is_dir():
            pip("install", "--quiet", "--target", str(site), name)
    return site


def run(package: str, sources: Path, keyword: str | None, workers: int) -> int:
    """pytest's exit status for the suite of ``package``."""
    suite = Path(SUITES[package])
    command = [sys.executable, "-m", "pytest", str(suite if suite.is_absolute() else sources / suite), "-q", "-ra"]
    command += ["-p", f"suites.{package}_plugin", "-p", "no:cacheprovider", "--rootdir", str(sources)]
    command += ["-c", str(sources / "pyproject.toml"), "-o", "addopts=", "-n", str(workers)]
    command += ["-k", keyword] if keyword else []
    paths = [HERE, HERE.parent / "src", sources, site_of(package)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths)}
    return subprocess.run(command, cwd=sources, env=environment, check=False).returncode


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES, help="whose tests")
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="pytest's filter, e.g. 'slab_deit and fx'")
    parser.add_argument("-n", dest="workers", type=int, default=0, help="pytest-xdist's workers (default: none)")
    parser.add_argument("--sources", type=Path, help="a checkout of the installed version's tag (default: its sdist)")
    arguments = parser.parse_args()
    sources = arguments.sources or unpacked_sdist(arguments.suite)
    if not (sources / "tests").is_dir():
        parser.error(f"no folder 'tests' in {str(sources)!r}; --sources takes a checkout of {arguments.suite}")
    return run(arguments.suite, sources.resolve(), arguments.keyword, arguments.workers)


if __name__ == "__main__":
    sys.exit(main())
