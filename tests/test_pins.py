"""The versions that tests are pinned to fit what pyproject.toml allows, and name no place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = {
    requirement.name: requirement
    for text in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    if (requirement := Requirement(text)).name != "slabformer"
}


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines[1:]), "one name==version a line"
    return dict(line.split("==") for line in lines[1:])


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_every_requirement_is_pinned_within_its_range(name: str, pins: dict[str, str]) -> None:
    assert REQUIREMENTS[name].specifier.contains(Version(pins[name]))


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_every_requirement_has_a_lower_bound(name: str) -> None:
    assert {specifier.operator for specifier in REQUIREMENTS[name].specifier} & {">=", "=="}


def test_one_package_has_one_range() -> None:
    texts = {text for extra in EXTRAS.values() for text in extra if not text.startswith("slabformer[")}
    assert len({Requirement(text).name for text in texts}) == len(texts)
