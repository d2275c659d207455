"""`slab train --qat.enabled`: the norms are folded first, Linears round while they train, and plain ones are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saved_digits import save_digits_model
from slabformer.cli.main import main
from slabformer.nn import PRepBN, RepBN
from slabformer.tasks import rounding
from slabformer.tasks.classification.config import ModelConfig, QatConfig, TrainConfig
from slabformer.tasks.classification.train import train
from slabformer.tasks.saved_model import load_model
from tiny_training import TINY_MODEL, AtStep, assert_same, tiny_config, weights

pytest.importorskip("torchao", reason="its fake quantisation rounds")


class InterruptedRunError(Exception):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, its norms faded."""
    output = tmp_path_factory.mktemp("qat") / "floats"
    train(tiny_config(output))
    return output


def rounding_config(trained: Path, name: str, **changes: Any) -> TrainConfig:
    model = ModelConfig(name="slab_deit_micro", args=dict(TINY_MODEL), weights=str(trained / "model.safetensors"))
    settings = {"model": model, "qat": QatConfig(enabled=True), "epochs": 2}
    return tiny_config(trained.parent / name, **{**settings, **changes})


def test_what_is_saved_has_no_norm_and_rounds_nothing_itself(trained: Path) -> None:
    result = train(rounding_config(trained, "rounded"))
    model, info = load_model(result.output / "model.safetensors")
    assert info.fused
    assert not any(isinstance(module, (PRepBN, RepBN)) for module in model.modules())
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    assert {"model.safetensors", "ema.safetensors", "best.safetensors"} <= {p.name for p in result.output.iterdir()}
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images), result.model(images))
        rounded = rounding.round_linears_(model)(images)
    difference = (rounded - result.model(images)).norm() / rounded.norm()
    assert 1e-4 < difference < 0.1


def test_weights_move_as_rounded_ones_would_have_it(trained: Path) -> None:
    before, _ = load_model(trained / "model.safetensors")
    folded = rounding.fold(before, torch.zeros(2, 3, 16, 16))
    rounded = rounding.round_linears_(folded)
    rounded(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in rounded.parameters())
    assert sum(parameter.grad.abs().sum() > 0 for parameter in rounded.parameters()) > 10


def test_an_interrupted_run_ends_bit_for_bit_as_one_that_ran_through(trained: Path) -> None:
    train(rounding_config(trained, "whole"))

    def interrupt() -> None:
        raise InterruptedRunError

    config = rounding_config(trained, "in_two")
    with pytest.raises(InterruptedRunError):
        train(config, observers=[AtStep(4, interrupt)])
    train(config)
    for name in ("model", "ema"):
        assert_same(weights(trained.parent / "in_two", name), weights(trained.parent / "whole", name))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ModelConfig()}, r"give model\.weights"),
        ({"teacher": "baseline"}, "takes no teacher"),
    ],
    ids=["random weights", "a teacher"],
)
def test_what_cannot_be_is_refused(trained: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rounding_config(trained, "refused", **changes)


def test_a_model_whose_norms_have_not_faded_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = save_digits_model(tmp_path / "fading.safetensors", gamma=0.5)
    model = ModelConfig(name="slab_deit_micro", weights=str(path))
    with pytest.raises(ValueError, match=r"of this model have not faded; give model\.weights of a run that has ended"):
        train(tiny_config(tmp_path / "run", model=model, qat=QatConfig(enabled=True)))
    assert not (tmp_path / "run").exists()


def test_a_missing_torchao_is_told_with_its_extra(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str) -> None:
        raise ImportError(f"slabformer needs torchao for this; pip install 'slabformer[{extra}]'")

    monkeypatch.setattr(rounding, "require", missing)
    with pytest.raises(ImportError, match=r"slabformer\[torchao\]"):
        train(rounding_config(trained, "missing"))
    assert not (trained.parent / "missing").exists()


def test_on_the_command_line_it_is_one_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--qat.enabled", "true", "--output", str(tmp_path / "run")]) == 2
    assert "give model.weights" in capsys.readouterr().err
