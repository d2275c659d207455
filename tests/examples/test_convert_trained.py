"""The way of an already trained model: its norms go, its accuracy stays."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "convert_trained.py"
    spec = importlib.util.spec_from_file_location("convert_trained", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_norm_goes_and_outputs_stay(example: ModuleType) -> None:
    outcome = example.main(epochs=4)
    assert outcome.norms_left == 0
    assert 0 < outcome.fused_difference <= 1e-5


@pytest.mark.slow
def test_accuracy_stays_within_a_point(example: ModuleType) -> None:
    outcome = example.main()
    assert outcome.before > 0.9
    assert outcome.after >= outcome.before - 0.01
