"""Files around the code agree with it and with each other: versions, workflows, hooks, packages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

import slabformer as sf
from slabformer import _moved

ROOT = Path(__file__).parent.parent
#: written by hand or by another program for another reader, not by us
YAML_FILES = sorted(
    path
    for pattern in ("*.cff", ".pre-commit-config.yaml", ".github/**/*.yml", "recipes/*.yaml")
    for path in ROOT.glob(pattern)
)
WORKFLOWS = [path for path in YAML_FILES if path.parent.name == "workflows"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_files_hold_mappings(path: Path) -> None:
    assert isinstance(load(path), dict)


def test_the_version_is_said_once_and_cited() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "slabformer.__version__"}
    assert load(ROOT / "CITATION.cff")["version"] == sf.__version__
    assert re.search(r"^## Unreleased$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_old_names_are_removed_with_the_release_that_was_told() -> None:
    told = set(re.findall(r"slabformer (\d+\.\d+)", Path(_moved.__file__).read_text()))
    assert told
    assert all(Version(sf.__version__) < Version(last) for last in told), "remove what _moved.py keeps"


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in load(workflow)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_release(workflow: Path) -> None:
    used = [step["uses"] for step in steps_of(workflow) if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", name)] == []


def test_the_workflow_calls_targets_that_make_has_on_every_python_that_is_declared() -> None:
    (workflow,) = WORKFLOWS
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = re.findall(r"\bmake ([\w-]+)", " ".join(step.get("run", "") for step in steps_of(workflow)))
    assert {"check", "test", "release"} <= set(called) <= targets
    declared = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c) for c in PROJECT["project"]["classifiers"]
    ]
    matrix = load(workflow)["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == [match[1] for match in declared if match]
    assert f">={matrix['python'][0]}" == PROJECT["project"]["requires-python"]
    assert matrix["torch"] == ["lowest", "newest"]


def test_hooks_run_the_versions_that_make_check_runs() -> None:
    repos = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in load(ROOT / ".pre-commit-config.yaml")["repos"]}
    assert all(re.fullmatch(r"v\d+(\.\d+)+", rev) for rev in repos.values())
    assert f"ruff=={repos['ruff-pre-commit'][1:]}\n" in (ROOT / "constraints.txt").read_text()


def test_every_data_file_of_the_package_is_declared() -> None:
    """What is no Python below the package stands in package-data, recipes included, which lie at the top."""
    package = ROOT / "src" / "slabformer"
    declared = {
        path for glob in PROJECT["tool"]["setuptools"]["package-data"]["slabformer"] for path in package.glob(glob)
    }
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files <= declared
    assert {path.resolve() for path in declared if path.suffix == ".yaml"} == set((ROOT / "recipes").glob("*.yaml"))
