"""Training by a recipe in MindSpore: the losses of torch, and the same bits after a stop."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slabformer as sf
from slabformer.tasks.classification.config import ModelConfig, TrainConfig
from slabformer.tasks.engine.observers import CsvFile, Observer
from slabformer.tasks.engine.signals import StoppedError
from slabformer.tasks.saved_model import load_model
from tiny_training import TINY_MODEL, AtStep, tiny_config
from tolerances import EXACT, assert_close

pytestmark = pytest.mark.mindspore
COLUMNS = ("step", "loss", "gamma", "lr")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore writes what it knows of an error to the working folder."""
    monkeypatch.chdir(tmp_path)


def config_for(output: Path) -> TrainConfig:
    """Mixup, an average, a fade, recalibration; without drop path, whose draws MindSpore has to itself."""
    model = ModelConfig(name="slab_deit_micro", args={**TINY_MODEL, "depth": 1})
    return tiny_config(output, accumulate=1, model=model, epochs=2, log_every=1, save_every=3)


def steps_of(output: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in COLUMNS} for row in CsvFile(output / "steps.csv", COLUMNS).rows()]


def test_losses_are_those_of_torch_and_a_stopped_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    from slabformer.mindspore.training.train import train
    from slabformer.tasks.classification.train import train as train_in_torch

    whole, stopped, torchs = (config_for(tmp_path / name) for name in ("whole", "stopped", "torchs"))
    result = train(whole)
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 4") as told:
        train(stopped, observers=[AtStep(4, lambda: signal.raise_signal(signal.SIGTERM))])
    assert told.value.exit_code == 143
    again = train(stopped)

    outputs = Path(whole.output), Path(stopped.output)
    assert again.metrics == result.metrics
    assert steps_of(outputs[0]) == steps_of(outputs[1])
    for name in ("model", "ema"):
        first, second = (load_file(output / f"{name}.safetensors") for output in outputs)
        for key, value in first.items():
            assert_close(second[key], value, EXACT)
        assert {f"{name}.py", f"{name}.ckpt"} <= {path.name for path in outputs[0].iterdir()}
    assert train(whole).already_finished

    train_in_torch(torchs)
    for ours, other in zip(steps_of(outputs[0]), steps_of(Path(torchs.output)), strict=True):
        assert ours == pytest.approx(other, rel=1e-3)  # float32 sums in another order, amplified from step to step
    model, info = load_model(outputs[0] / "model.safetensors")
    fused, report = sf.fuse(model, torch.randn(2, *info.input_size))
    assert report.num_kept == 0
    sf.verify(model, fused, torch.randn(4, *info.input_size))
    with pytest.raises(ValueError, match="is not the list of what a run wrote"):
        train_in_torch(config_for(outputs[0]))


def test_what_cannot_be_read_is_told_in_its_own_words(tmp_path: Path) -> None:
    from slabformer.mindspore.training.train import train

    config = config_for(tmp_path / "run")
    config.data.max_unreadable = 0
    victim = sorted(Path(config.data.path).rglob("*.png"))[0]
    victim.write_bytes(b"no image")
    with pytest.raises((ValueError, RuntimeError, OSError)) as told:
        train(config, observers=[Observer()])
    assert "unreadable" in str(told.value) or "cannot be read" in str(told.value)
    assert "\n" not in str(told.value)
