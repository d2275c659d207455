"""`slab train`: a recipe and overrides in, a folder out; mistakes in one line."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml

from image_folders import fill_splits
from slabformer.cli.main import main
from slabformer.tasks.engine.console import ConsoleObserver
from slabformer.tasks.engine.observers import RunStart, StepReport
from slabformer.tasks.engine.signals import StoppedError

RECIPE = """
model:
  name: slab_deit_micro
  args: {embed_dim: 16, depth: 1, num_heads: 2}
data: {image_size: 16, crop_pct: 1.0}
lr_schedule: {warmup_epochs: 0}
epochs: 2
batch_size: 6
num_workers: 0
log_every: 2
device: cpu
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return fill_splits(tmp_path / "images")


def slab_train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def test_a_recipe_makes_a_folder(
    recipe: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert slab_train("--config", recipe, "--data", images, "--output", out, "--ema.decay", "0.9") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"finished: {out}  top1 ")
    assert "epoch 1/2  step 2/6" in captured.err
    assert "gamma" in captured.err
    names = {path.name.split(".out.")[0] for path in out.iterdir()}
    assert names == {
        *("config.yaml", "metrics.csv", "steps.csv", "result.json", "events", "manifest.json"),
        *("model.safetensors", "ema.safetensors", "best.safetensors", "checkpoint-3.pt", "checkpoint-6.pt"),
    }
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["ema"]["decay"] == 0.9
    assert resolved["data"]["path"] == str(images)
    assert resolved["optimizer"]["weight_decay"] == 0.05
    assert slab_train("--config", out / "config.yaml") == 0
    assert capsys.readouterr().out.startswith(f"already finished: {out}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown option '--epoch'; did you mean '--epochs'?"),
        (["--gamma.fad", "0.3"], "unknown option '--gamma.fad'; did you mean '--gamma.fade'?"),
        (["--optimiser.lr", "0.3"], "did you mean '--optimizer.lr'?"),
        (["--precision", "fp8"], "precision"),
        (["--epochs", "many"], "epochs"),
        (["--gamma.fade", "1.5"], "gamma.fade must be above 0 and at most 1, got 1.5"),
        (["--model.name", "slab_deit_micr"], "did you mean 'slab_deit_micro'?"),
        (["--data", "/nowhere"], "no data at '/nowhere'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, recipe: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slab_train("--config", recipe, "--data", images, "--output", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("epoch: 3", "did you mean 'epochs'"), ("gamma: {fad: 0.3}", "did you mean 'gamma.fade'")],
    ids=["top", "nested"],
)
def test_an_unknown_key_in_a_recipe_is_refused_with_the_nearest(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert slab_train("--config", path) == 2
    assert message in capsys.readouterr().err


def test_print_config_shows_the_whole_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        slab_train("--config", recipe, "--gamma.shape", "cosine", "--print-config")
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["gamma"]["shape"] == "cosine"
    assert shown["epochs"] == 2
    assert shown["optimizer"]["clip_norm"] == 5.0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stopped_run_says_so_and_exits_with_the_signal_s_code(
    signum: int, recipe: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise StoppedError("stopped by a signal", signum)

    monkeypatch.setattr("slabformer.tasks.classification.train.train", stop)
    with pytest.raises(SystemExit) as ended:
        slab_train("--config", recipe, "--data", images)
    assert ended.value.code == 128 + signum
    assert capsys.readouterr().err == "slab: stopped by a signal\n"


def test_on_a_terminal_there_is_one_bar_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    text = io.StringIO()
    console = ConsoleObserver(text)
    console.on_start(RunStart(epochs=1, steps_per_epoch=4, epoch=0, step=0))
    report = StepReport(epoch=1, step=2, samples=8, loss=1.5, gamma=0.25, lr=1e-3, images_per_second=321.0)
    console.on_step(report)
    for done in range(3):
        console.on_phase("evaluate", done, 2)
    console.on_epoch({"epoch": 1, "train_loss": 1.25, "top1": 0.75, "gamma": 0.0})
    console.on_end()
    written = text.getvalue()
    for part in ("loss 1.5000", "gamma 0.250", "lr 1.00e-03", "321 img/s", "epoch 1: train_loss 1.25  top1 0.75"):
        assert part in written
