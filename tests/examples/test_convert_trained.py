"""The way of an already trained model: its norms go, its accuracy stays."""

from __future__ import annotations

from types import ModuleType

import pytest

from example_files import load_example

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("convert_trained")


def test_every_norm_goes_and_outputs_stay(example: ModuleType) -> None:
    outcome = example.main(epochs=4)
    assert outcome.norms_left == 0
    assert 0 < outcome.fused_difference <= 1e-5


@pytest.mark.slow
def test_accuracy_stays_within_a_point(example: ModuleType) -> None:
    outcome = example.main()
    assert outcome.before > 0.9
    assert outcome.after >= outcome.before - 0.01
