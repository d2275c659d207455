"""What of training in MindSpore needs no MindSpore: which recipes have a counterpart, the data, folders, messages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slabformer.cli import main as cli
from slabformer.cli.options import parse
from slabformer.cli.train import parser, to_train_config
from slabformer.mindspore import runtime
from slabformer.mindspore.training.data import TrainingBatches, whole_batches
from slabformer.mindspore.training.recipe import check_recipe
from slabformer.mindspore.training.train import MindSporeFolder
from slabformer.tasks.classification.config import GammaConfig, TrainConfig
from slabformer.tasks.classification.data import Loader, create_loader
from slabformer.tasks.classification.mixup import MixedStep
from slabformer.tasks.engine.config import OptimizerConfig
from slabformer.tasks.engine.ema import ModelEma, decay_at
from slabformer.tasks.engine.folder import RunFolder
from slabformer.tasks.engine.seeds import reseed
from small_models import saved
from tiny_training import tiny_config
from tolerances import EXACT, FLOAT32, assert_close

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))
CLASSIFIERS = [path for path in RECIPES if not path.name.startswith(("detection_", "llama_"))]


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_every_recipe_for_classifiers_has_a_counterpart(path: Path) -> None:
    check_recipe(to_train_config(parse(parser(), ["--config", str(path)], "slab train")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "self"}, r"teacher \('self'\) has no counterpart in MindSpore; distil with `slab train`"),
        ({"compile": True}, r"compile \(True\) has no counterpart .* leave it out"),
        ({"accumulate": 2}, r"accumulate \(2\) has no counterpart .* larger batch_size"),
        ({"gamma": GammaConfig(align=0.1)}, r"gamma\.align \(0\.1\) has no counterpart"),
        ({"optimizer": OptimizerConfig(name="lamb")}, r"optimizer\.name \('lamb'\) has no counterpart .* use adamw"),
        (
            {"optimizer": OptimizerConfig(args={"amsgrad": True})},
            r"optimizer\.args\.amsgrad \(True\) has no counterpart .* adamw takes betas and eps",
        ),
    ],
    ids=["teacher", "compile", "accumulate", "align", "optimizer", "amsgrad"],
)
def test_settings_without_counterpart_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(TrainConfig(**changes))


def test_a_refused_recipe_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert cli.main(["mindspore", "train", "--accumulate", "2", "--output", str(output)]) == cli.USAGE
    assert capsys.readouterr().err.startswith("slab: accumulate (2) has no counterpart in MindSpore;")
    assert not output.exists()


VERBS = {
    "train": ["--output", "run"],
    "eval": ["m.safetensors", "--data", "digits"],
    "convert": ["m.safetensors", "--output", "m.ckpt"],
    "export": ["m.safetensors", "--output", "exported"],
    "verify": ["m.safetensors", "m.safetensors"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"mindspore": "2.10.0", "numpy": "2.3.1"}, "MindSpore 2.10.0 is built for NumPy 1, found 2.3.1; pip install"),
        ({"mindspore": "2.4.0", "numpy": "1.26.4"}, "tried with MindSpore from 2.10 to below 2.12, found 2.4.0;"),
        ({}, "needs mindspore for this; pip install 'slabformer[mindspore]'"),
    ],
    ids=["numpy-2", "old", "missing"],
)
def test_every_verb_names_what_is_missing_in_one_line(
    verb: str,
    versions: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved(tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "_version", versions.get)
    monkeypatch.setitem(__import__("sys").modules, "mindspore", None)  # import fails, installed or not
    assert cli.main(["mindspore", verb, *VERBS[verb]]) == cli.USAGE
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("INFO", "WARNING"))]
    assert len(told) == 1
    assert message in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_published_layout_is_for_ckpt_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["mindspore", "convert", str(saved(tmp_path / "m.safetensors")), "--published"]
    assert cli.main([*given, "--output", str(tmp_path / "x.safetensors")]) == cli.USAGE
    assert "--published is a layout of .ckpt files" in capsys.readouterr().err
    assert cli.main([*given, "--output", str(tmp_path / "x.onnx")]) == cli.USAGE


def loader_of(config: TrainConfig) -> Loader:
    return create_loader(config.data, config.augment, "train", batch_size=config.batch_size, seed=config.seed)


def rows_of(config: TrainConfig, *, smoothing: float = 0.0, **where: int) -> TrainingBatches:
    loader = loader_of(config)
    mixed = MixedStep(config.augment, len(loader.class_names), config.batch_size)
    return TrainingBatches(loader, mixed, len(loader.class_names), smoothing, seed=config.seed, **where)


def test_batches_are_those_of_torch_and_go_on_in_the_middle(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    batches = rows_of(config)
    whole = [*batches, *batches]
    assert [int(step) for _, _, step in whole] == list(range(2 * len(batches)))
    later = list(rows_of(config, epoch=1, batch=2))
    assert len(later) == len(batches) - 2
    for given, again in zip(whole[-len(later) :], later, strict=True):
        assert all((one == other).all() for one, other in zip(given, again, strict=True))
    reseed(config.seed, 0, 0)
    loader = loader_of(config)
    images, targets = MixedStep(config.augment, len(loader.class_names), config.batch_size).mix(next(iter(loader)))
    assert_close(torch.from_numpy(whole[0][0]), images, EXACT)
    assert_close(torch.from_numpy(whole[0][1]), targets, EXACT)


def test_smoothed_labels_give_the_loss_of_torch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config.augment.mixup = config.augment.cutmix = 0.0
    config.augment.label_smoothing = 0.1
    _, targets, _ = next(iter(rows_of(config, smoothing=0.1)))
    labels = next(iter(loader_of(config)))[1]
    logits = torch.randn(targets.shape, generator=torch.Generator().manual_seed(0))
    wanted = MixedStep(config.augment, targets.shape[1], config.batch_size).loss(logits, labels)
    given = -(torch.from_numpy(targets) * logits.log_softmax(-1)).sum(-1).mean()
    assert_close(given, wanted, FLOAT32)


def test_what_fails_while_reading_is_kept() -> None:
    class Broken(Loader):
        def __init__(self) -> None:
            pass

        def __len__(self) -> int:
            return 3

        def set_epoch(self, epoch: int) -> None:
            pass

        def set_start(self, batch_index: int) -> None:
            pass

        def __iter__(self) -> Any:
            raise ValueError("17 of 20 images cannot be read")

    batches = TrainingBatches(Broken(), MixedStep(TrainConfig().augment, 2, 2), 2, 0.0, seed=0)
    with pytest.raises(ValueError, match="17 of 20"):
        next(iter(batches))
    assert str(batches.error) == "17 of 20 images cannot be read"


def test_short_batches_are_filled_up_and_cut_back() -> None:
    seen: list[int] = []

    def run(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1).sum(1)

    images = torch.randn(5, 3, 2, 2)
    assert_close(whole_batches(run, 8)(images), images.flatten(1).sum(1), EXACT)
    assert_close(whole_batches(run, 5)(images), images.flatten(1).sum(1), EXACT)
    assert seen == [8, 5]


@pytest.mark.parametrize("warmup", [True, False], ids=["warmup", "constant"])
def test_the_average_decays_as_in_torch(warmup: bool) -> None:
    model = nn.Linear(1, 1)
    ema = ModelEma(model, 0.9, warmup)
    values = [0.0]
    with torch.no_grad():
        model.weight.zero_()
        ema.module.weight.zero_()
        for step in range(1, 6):
            model.weight.add_(1)
            ema.update(model, step)
            decay = decay_at(step, 0.9, warmup)
            values.append(values[-1] + (1 - decay) * (step - values[-1]))
            assert float(ema.module.weight) == pytest.approx(values[-1])


def test_runs_of_torch_and_of_mindspore_keep_out_of_each_others_folders(tmp_path: Path) -> None:
    for kind, other in ((RunFolder, MindSporeFolder), (MindSporeFolder, RunFolder)):
        path = tmp_path / kind.__name__
        config = TrainConfig(output=str(path)).to_dict()
        with kind(path, config).claimed():
            pass
        with pytest.raises(ValueError, match="is not the list of what a"):
            other(path, config).refuse_if_taken()
        kind(path, config).refuse_if_taken()


def test_help_imports_no_mindspore(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mindspore", None)
    for verb in VERBS:
        with pytest.raises(SystemExit) as done:
            cli.main(["mindspore", verb, "--help"])
        assert done.value.code == 0
    assert importlib.metadata.version("slabformer") in cli.versions()
    assert "slab mindspore verify" in capsys.readouterr().out
