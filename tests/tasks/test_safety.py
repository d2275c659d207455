"""What goes wrong in training is said in one line, and what was good before stays."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slabformer.tasks.classification.build import build_model
from slabformer.tasks.classification.config import AugmentConfig, GammaConfig, ModelConfig, TrainConfig
from slabformer.tasks.classification.train import train
from slabformer.tasks.engine.checkpoint import CheckpointStore, DamagedCheckpointError, read_checkpoint
from slabformer.tasks.engine.config import LrConfig
from slabformer.tasks.engine.nonfinite import (
    NonFiniteError,
    NonFiniteGuard,
    first_nonfinite_module,
    first_nonfinite_tensor,
)
from slabformer.tasks.engine.observers import Observer, StepReport
from slabformer.tasks.engine.signals import StoppedError
from tiny_training import TINY_MODEL, AtStep, assert_same, tiny_config, weights


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def short(output: Path, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "epochs": 2,
        "lr_schedule": LrConfig(warmup_epochs=0),
        "model": ModelConfig(name="slab_deit_micro", args=TINY_MODEL),
        "augment": AugmentConfig(policy="none", mixup=0.0, cutmix=0.0),
    }
    return tiny_config(output, **{**settings, **changes})


class Spoil(Observer):
    """Puts a NaN into a parameter after a step, as a bad update would."""

    def __init__(self, model: nn.Module, name: str, step: int) -> None:
        self.parameter, self.step = model.get_parameter(name), step

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            with torch.no_grad():
                self.parameter.view(-1)[0] = float("nan")


def a_model() -> nn.Module:
    return built(ModelConfig(name="slab_deit_micro", args=TINY_MODEL))


def built(config: ModelConfig, num_classes: int = 3, image_size: int = 16) -> nn.Module:
    return build_model(config, num_classes, image_size)[0]


def test_a_nan_names_step_module_images_and_the_checkpoint_that_is_good(tmp_path: Path) -> None:
    model = a_model()
    with pytest.raises(NonFiniteError) as caught:
        train(short(tmp_path, save_every=0), model=model, observers=[Spoil(model, "blocks.1.mlp.fc1.weight", step=4)])
    message = str(caught.value)
    assert "became non-finite in step 5 (epoch 2, batch 3)" in message
    assert "first in the output of blocks.1.mlp.fc1 (Linear)" in message
    assert ".png" in message
    assert "the last good checkpoint is" in message
    for path in CheckpointStore(tmp_path).paths():
        assert first_nonfinite_tensor(read_checkpoint(path)["model"]) is None


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = a_model()
    # the last step of an epoch: no forward comes between the spoiled weight and the checkpoint
    with pytest.raises(NonFiniteError, match=r"head\.bias is not finite after step 3; nothing was saved"):
        train(short(tmp_path), model=model, observers=[Spoil(model, "head.bias", step=3)])
    assert [path.name for path in CheckpointStore(tmp_path).paths()] == ["checkpoint-2.pt"]


def test_the_guard_keeps_the_first_bad_step_until_asked() -> None:
    guard = NonFiniteGuard(torch.device("cpu"))
    for step, value in enumerate([1.0, 2.0, float("inf"), 3.0, float("nan")]):
        guard.observe(step, torch.tensor(0.0), torch.tensor(value))
    assert guard.first_bad_step() == 2


def test_the_search_leaves_statistics_modes_and_hooks_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())).train()
    with torch.no_grad():
        model[2][0].bias[1] = float("inf")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert first_nonfinite_module(model, lambda: model(torch.randn(8, 4))) == "2.0 (Linear)"
    assert_same(dict(model.named_buffers()), before)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_no_culprit_is_said_to_be_none() -> None:
    model = nn.Linear(4, 4)
    assert first_nonfinite_module(model, lambda: model(torch.randn(8, 4))) is None


def test_a_full_disk_stops_training_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = AtStep(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        with pytest.raises(OSError, match="checkpoint-3"):
            train(short(tmp_path), observers=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in CheckpointStore(tmp_path).paths()] == ["checkpoint-2.pt"]
    assert not list(tmp_path.glob(".*.part"))


def test_an_output_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; give another output folder"):
        train(short(tmp_path / "file"))


def test_another_configuration_is_refused_by_its_key(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(short(run, epochs=1))
    with pytest.raises(ValueError, match=r"holds another run: gamma.fade was 0.5, now 0.4; choose another output"):
        train(short(run, epochs=1, gamma=GammaConfig(fade=0.4, warmup=0.1)))
    with pytest.raises(ValueError, match=r"model.args.depth was 2, now 1"):
        train(short(run, epochs=1, model=ModelConfig(name="slab_deit_micro", args={**TINY_MODEL, "depth": 1})))


def test_a_finished_run_says_so_and_gives_its_result_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    first = train(short(run, epochs=1))
    written = (run / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        again = train(short(run, epochs=1, log_every=7))
    assert (first.already_finished, again.already_finished) == (False, True)
    assert "is finished already" in caplog.text
    assert again.metrics == first.metrics
    assert again.history == first.history
    assert_same(dict(again.model.state_dict()), {name: t.cpu() for name, t in first.model.state_dict().items()})
    assert (run / "model.safetensors").stat().st_mtime_ns == written


def test_overwrite_starts_again_and_keeps_foreign_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(short(run, epochs=1))
    (run / "notes.txt").write_text("mine")
    result = train(short(run, epochs=1, seed=5, overwrite=True))
    assert not result.already_finished
    assert (run / "notes.txt").read_text() == "mine"


def test_never_resume_refuses_a_run_that_is_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(short(run, epochs=1))
    with pytest.raises(ValueError, match="holds a run already"):
        train(short(run, epochs=1, resume="never"))


def test_nothing_but_damaged_checkpoints_is_not_a_fresh_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(short(run, epochs=1))
    (run / "result.json").unlink()
    for path in run.glob("checkpoint-*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedCheckpointError, match="every checkpoint"):
        train(short(run, epochs=1))


def test_a_mistake_in_the_recipe_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'slab_deit_micro'"):
        train(short(tmp_path / "run", model=ModelConfig(name="slab_deit_micr")))
    assert not (tmp_path / "run").exists()


def test_a_signal_during_evaluation_stops_it(tmp_path: Path) -> None:
    import os
    import signal

    class SignalInEvaluation(Observer):
        def on_phase(self, name: str, done: int, total: int | None) -> None:
            if name == "evaluate" and done == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError) as caught:
        train(short(tmp_path), observers=[SignalInEvaluation()])
    assert caught.value.exit_code == 143
    assert "stopped by SIGTERM after step 3" in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    found = CheckpointStore(tmp_path).load_latest()
    assert found is not None
    assert found[1]["position"] == {"epoch": 0, "batch": 5, "step": 3}


def test_a_fused_or_foreign_file_is_no_start(tmp_path: Path) -> None:
    result = train(short(tmp_path / "run", epochs=1))
    path = str(result.output / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds 'slab_deit_micro', model.name is 'deit_micro'"):
        built(ModelConfig(name="deit_micro", weights=path))
    with pytest.raises(ValueError, match=r"is for images of 16, data.image_size is 32"):
        built(ModelConfig(name="slab_deit_micro", weights=path), 3, 32)
    with pytest.raises(ValueError, match=r"model.args.depth differs"):
        built(ModelConfig(name="slab_deit_micro", weights=path, args={"depth": 5}))
    again = built(ModelConfig(name="slab_deit_micro", weights=path), 7, 16)
    assert again(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_a_trained_baseline_is_converted_and_fades(tmp_path: Path) -> None:
    baseline = train(short(tmp_path / "baseline", epochs=1, model=ModelConfig(name="deit_micro", args=TINY_MODEL)))
    assert all(row["gamma"] == 0 for row in baseline.history)
    start = ModelConfig(name="deit_micro", weights=str(baseline.output / "model.safetensors"), convert_norms=True)
    tuned = train(short(tmp_path / "tuned", model=start, gamma=GammaConfig(fade=0.5, fit_batches=2)))
    assert [row["gamma"] for row in tuned.history] == [0.0, 0.0]
    assert "blocks.0.norm1.rep.running_mean" in weights(tmp_path / "tuned")
    restored = built(ModelConfig(name="deit_micro", weights=str(tuned.output / "model.safetensors")))
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), tuned.model(x))


def test_a_model_that_has_faded_is_trained_on_without_its_norms(tmp_path: Path) -> None:
    first = train(short(tmp_path / "first", epochs=1))
    start = ModelConfig(name="slab_deit_micro", weights=str(first.output / "model.safetensors"))
    second = train(short(tmp_path / "second", epochs=1, model=start))
    assert second.history[0]["gamma"] == 0

    def norms(folder: str) -> Tensor:
        return weights(tmp_path / folder)["blocks.0.norm1.norm.weight"]

    assert torch.equal(norms("first"), norms("second"))
