"""The versions that tests are pinned to fit what pyproject.toml allows, and name no place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from slabformer.mindspore.runtime import TRIED

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: in an environment of its own, which constraints-mindspore.txt pins: MindSpore needs NumPy 1
APART = EXTRAS.pop("mindspore")
REQUIREMENTS = {
    requirement.name: requirement
    for text in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    if (requirement := Requirement(text)).name != "slabformer"
}


def pins_in(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines[1:]), "one name==version a line"
    return dict(line.split("==") for line in lines[1:])


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return pins_in("constraints.txt")


def test_mindspore_is_pinned_within_its_range_beside_numpy_1() -> None:
    apart = pins_in("constraints-mindspore.txt")
    found = {one.name: one for one in map(Requirement, APART) if one.name != "slabformer"}
    assert set(found) == {"mindspore", "numpy"}
    assert all(one.specifier.contains(Version(apart[name])) for name, one in found.items())
    lowest, beyond = (".".join(map(str, version)) for version in TRIED)
    assert found["mindspore"].specifier == SpecifierSet(f">={lowest},<{beyond}")


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_every_requirement_is_pinned_within_its_range(name: str, pins: dict[str, str]) -> None:
    assert REQUIREMENTS[name].specifier.contains(Version(pins[name]))


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_every_requirement_has_a_lower_bound(name: str) -> None:
    assert {specifier.operator for specifier in REQUIREMENTS[name].specifier} & {">=", "=="}


def test_one_package_has_one_range() -> None:
    texts = {text for extra in EXTRAS.values() for text in extra if not text.startswith("slabformer[")}
    assert len({Requirement(text).name for text in texts}) == len(texts)
