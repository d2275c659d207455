"""What holds for every test: those that need a GPU are skipped without one, each starts from the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slabformer.deployment import allocator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that fails must fail again."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _allocator() -> Iterator[None]:
    """No test changes for good how this process allocates; a process of its own shows what that does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocator, "_tell", lambda library, settings: True)
        yield
