"""What holds for every test: those that need a GPU or MindSpore are skipped without, each starts from the same seed."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

from slabformer.measure import allocator
from slabformer.ops import dispatch
from slabformer.ops.native import build

# tests that import onnxruntime themselves leave no identifiers behind either
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# a busy machine takes longer for an example, which says nothing about the code
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": "" if torch.cuda.is_available() else "needs a CUDA device",
        "mindspore": ""
        if find_spec("mindspore") is not None
        else "needs MindSpore: pip install 'slabformer[mindspore]'",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that fails must fail again."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests on a GPU run its kernels, whether or not they were timed on it."""
    if request.node.get_closest_marker("gpu") is not None:
        monkeypatch.setenv(dispatch.KERNELS, "1")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """What tests share is the same whichever of them comes first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _allocator() -> Iterator[None]:
    """No test changes for good how this process allocates; a process of its own shows what that does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocator, "_tell", lambda library, settings: True)
        yield


@pytest.fixture(autouse=True, scope="session")
def _sources() -> Iterator[None]:
    """The source of a class is read once: each parser of a recipe looks for the docstrings of the same ones."""
    read = inspect.getsource
    remembered = functools.cache(read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", lambda found: (remembered if isinstance(found, type) else read)(found))
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """What is built in C++ lands in no home folder; workers share it."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build.CACHE, str((base if worker_id == "master" else base.parent) / "slabformer"))
        yield


@pytest.fixture
def _compiler() -> None:
    """Skip where nothing can be built in C++."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
