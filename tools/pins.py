"""The versions that tests run with: `make lock` writes constraints.txt, `make test-oldest` tries the lowest supported.

python tools/pins.py newest   what this environment holds, exactly
python tools/pins.py oldest   the lower bound of everything that pyproject.toml names
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
#: `name[extras]>=lowest`, with an upper bound or without, or `name==version`
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?\s*(?P<operator>>=|==)\s*(?P<version>[\w.*]+)")
#: installers, which no environment needs to agree on
INSTALLERS = {"pip", "setuptools", "wheel"}


#: in an environment of its own
APART = "mindspore"


def requirements() -> Iterator[re.Match[str]]:
    """Every requirement of every extra, our own extras and :data:`APART` left out.

    Raises:
        ValueError: If one has no lower bound.
    """
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    for text in (
        *project["dependencies"],
        *(line for name, extra in project["optional-dependencies"].items() if name != APART for line in extra),
    ):
        if text.startswith(f"{project['name']}["):
            continue
        match = REQUIREMENT.match(text)
        if match is None:
            raise ValueError(f"pyproject.toml names {text!r} without a lower bound; write name>=version")
        yield match


def newest() -> Iterator[str]:
    """Everything installed here but ourselves and installers, sorted."""
    pins = {
        re.sub(r"[-_.]+", "-", distribution.name).lower(): distribution.version.partition("+")[0]
        for distribution in importlib.metadata.distributions()
    }
    yield f"# written by `make lock` on Python {platform.python_version()}, {platform.system()}: what CI tests with"
    yield from (f"{name}=={pins[name]}" for name in sorted(pins.keys() - INSTALLERS - {"slabformer"}))


def oldest() -> Iterator[str]:
    """The lowest version of each requirement."""
    yield "# lower bounds of pyproject.toml"
    yield from sorted({f"{match['name']}=={match['version']}" for match in requirements()})


def main() -> None:
    """Print one of the lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["newest", "oldest"])
    which = parser.parse_args().which
    print(*(newest() if which == "newest" else oldest()), sep="\n")


if __name__ == "__main__":
    main()
