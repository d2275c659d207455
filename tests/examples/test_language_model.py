"""Anybody's Trainer: norms fade, fold, and the saved model writes what the fused one does."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from example_files import load_example

pytest.importorskip("transformers", reason="the Trainer is transformers'")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("language_model")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_every_norm_goes_and_the_saved_model_writes_the_same(
    example: ModuleType, architecture: str, tmp_path: Path
) -> None:
    outcome = example.main(architecture, steps=100, output=tmp_path)
    assert outcome.losses[-1] < outcome.losses[0] - 1
    assert (outcome.norms_folded, outcome.norms_left) == (5, 0)
    assert 0 < outcome.fused_difference <= 1e-5
    assert outcome.text.startswith(example.PROMPT)
    assert outcome.text == outcome.text_of_saved
