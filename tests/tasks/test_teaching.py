"""`slab train --teacher`: which teachers there are, images without labels, and that a run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from csv_files import csv_rows
from image_folders import picture
from slabformer.cli.main import main
from slabformer.distillation import LossWeights
from slabformer.tasks.classification import teaching
from slabformer.tasks.classification.config import DataConfig, DistillConfig, GammaConfig, ModelConfig
from slabformer.tasks.classification.sources import open_source
from slabformer.tasks.classification.train import train
from slabformer.tasks.engine.observers import Observer
from slabformer.tasks.saved_model import ModelInfo, save_model
from slabformer.testing import randomize_norms_
from tiny_training import TINY_MODEL, AtStep, tiny_config

ARGUMENTS = {**TINY_MODEL, "img_size": 16, "num_classes": 3}
NAMES = ["cat", "dog", "owl"]


class InterruptedRunError(Exception):
    pass


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A LayerNorm classifier in a file."""
    return write_classifier(tmp_path / "baseline.safetensors", NAMES)


def write_classifier(path: Path, names: list[str], size: int = 16, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    arguments = {**ARGUMENTS, "num_classes": len(names), "img_size": size}
    model = randomize_norms_(timm.create_model("deit_micro", **arguments), seed)
    save_model(
        model, path, ModelInfo(model="deit_micro", model_args=arguments, class_names=names, input_size=(3, size, size))
    )
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images and nothing else."""
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    for index in range(30):
        picture(index).save(folder / f"{index}.png")
    return folder


def self_taught(output: Path, weights: Path, images: Path | None = None, **changes: Any) -> Any:
    data = {} if images is None else {"data": DataConfig(path=str(images), image_size=16, crop_pct=1.0)}
    model = ModelConfig(name="deit_micro", weights=str(weights), convert_norms=True)
    settings: dict[str, Any] = {
        "model": model,
        "teacher": "self",
        "gamma": GammaConfig(fade=0.5, fit_batches=2),
        **data,
    }
    return tiny_config(output, **settings | {"epochs": 2} | changes)


def test_a_model_teaches_itself_on_images_without_labels(tmp_path: Path, weights: Path, images: Path) -> None:
    result = train(self_taught(tmp_path / "run", weights, images))
    rows = csv_rows(tmp_path / "run" / "steps.csv")
    assert all(float(row["logits"]) >= 0 and float(row["hidden"]) >= 0 for row in rows)
    for row in rows:
        assert float(row["logits"]) + float(row["hidden"]) == pytest.approx(float(row["loss"]), rel=1e-4)
    assert "labels" not in rows[0]
    assert 0 <= result.metrics["top1"] <= 1
    assert result.model.num_classes == 3


def test_before_fading_agreement_with_the_teacher_is_total(tmp_path: Path, weights: Path, images: Path) -> None:
    model = ModelConfig(name="deit_micro", weights=str(weights))
    config = self_taught(tmp_path / "run", weights, images, model=model, teacher=str(weights), gamma=GammaConfig())
    config.optimizer.lr = config.lr_schedule.warmup_lr = config.lr_schedule.min_lr = 1e-9
    assert train(config).metrics["top1"] == 1


def test_labels_count_beside_the_teacher(tmp_path: Path, weights: Path) -> None:
    train(self_taught(tmp_path / "run", weights))
    row = csv_rows(tmp_path / "run" / "steps.csv")[-1]
    assert {"logits", "hidden", "labels"} <= row.keys()
    train(self_taught(tmp_path / "less", weights, distill=DistillConfig(label_weight=0, weights=LossWeights(hidden=0))))
    assert {"logits"} == csv_rows(tmp_path / "less" / "steps.csv")[-1].keys() & {"logits", "hidden", "labels"}


def test_a_taught_run_goes_on_bit_for_bit(tmp_path: Path, weights: Path, images: Path) -> None:
    def stop() -> None:
        raise InterruptedRunError

    train(self_taught(tmp_path / "whole", weights, images))
    observers: list[Observer] = [AtStep(3, stop)]
    with pytest.raises(InterruptedRunError):
        train(self_taught(tmp_path / "halved", weights, images), observers=observers)
    train(self_taught(tmp_path / "halved", weights, images))
    whole, halved = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(whole[name], halved[name]) for name in whole)


def test_another_teacher_is_not_gone_on_with(tmp_path: Path, weights: Path, images: Path) -> None:
    def stop() -> None:
        raise InterruptedRunError

    teacher = write_classifier(tmp_path / "teacher.safetensors", NAMES)
    config = self_taught(tmp_path / "run", weights, images, teacher=str(teacher))
    with pytest.raises(InterruptedRunError):
        train(config, observers=[AtStep(3, stop)])
    write_classifier(teacher, NAMES, seed=1)
    with pytest.raises(ValueError, match=r"belongs to another run: teacher weights was '\w+', now '\w+'"):
        train(config)


def test_released_weights_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    asked: list[tuple[str, bool]] = []

    def create(name: str, *, pretrained: bool) -> Any:
        asked.append((name, pretrained))
        return timm.create_model("deit_micro", **ARGUMENTS)

    monkeypatch.setattr(teaching, "create_model", create)
    monkeypatch.setattr(teaching, "_input_size", lambda model, default: 16)
    data = DataConfig(path=str(images), image_size=16, crop_pct=1.0)
    train(tiny_config(tmp_path / "run", teacher="baseline", data=data, epochs=2))
    assert asked == [("deit_micro", True)]


@pytest.fixture(params=["classes", "size", "missing", "random", "no baseline", "weight"])
def mistake(request: pytest.FixtureRequest, tmp_path: Path, weights: Path, images: Path) -> tuple[Any, str]:
    other = write_classifier(tmp_path / "other.safetensors", ["a", "b"])
    large = write_classifier(tmp_path / "large.safetensors", NAMES, 32)
    run = tmp_path / "run"
    cases = {
        "classes": (self_taught(run, weights, teacher=str(other)), "has 2 classes, the student 3"),
        "size": (self_taught(run, weights, teacher=str(large)), "takes images of 32 pixels, data.image_size is 16"),
        "missing": (self_taught(run, weights, teacher=str(tmp_path / "gone.safetensors")), "gone.safetensors"),
        "random": (tiny_config(run, teacher="self"), "its weights are random; set model.weights or model.pretrained"),
        "no baseline": (self_taught(run, weights, teacher="baseline"), "deit_micro is its own LayerNorm baseline"),
        "weight": (
            self_taught(run, weights, images, distill=DistillConfig(label_weight=1)),
            "distill.label_weight needs labels",
        ),
    }
    return cases[request.param]


def test_mistakes_are_told_in_one_line_before_anything_is_written(mistake: tuple[Any, str]) -> None:
    config, words = mistake
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not Path(config.output).exists()


def test_images_without_labels_need_a_teacher(images: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(images), image_size=16, labels=False)
    with pytest.raises(ValueError, match=r"data.labels false needs a teacher"):
        train(tiny_config(tmp_path / "run", data=data))


def test_all_images_below_a_folder_are_read_whatever_their_folders_are_called(images: Path) -> None:
    nested = images / "holiday" / "beach"
    nested.mkdir(parents=True)
    picture(99).save(nested / "x.png")
    data = DataConfig(path=str(images), labels=False)
    split = {name: open_source(data, name) for name in ("train", "validation")}  # type: ignore[arg-type]
    assert sum(map(len, split.values())) == 31
    assert all(source.class_names == [] and source.read(0)[1] == 0 for source in split.values())
    names = [{source.name(index) for index in range(len(source))} for source in split.values()]
    assert names[0].isdisjoint(names[1])
    with pytest.raises(ValueError, match="no images in"):
        open_source(DataConfig(path=str(images / "holiday"), labels=False, train_split="nothing"), "train")


def test_labels_of_named_data_are_left_alone() -> None:
    source = open_source(DataConfig(path="digits", labels=False), "validation")
    assert source.class_names == []
    assert {source.read(index)[1] for index in range(20)} == {0}


def test_the_command_line_takes_a_teacher(
    tmp_path: Path, weights: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "--model.name": "slab_deit_micro",
        "--model.args": '{"embed_dim": 16, "depth": 2, "num_heads": 2}',
        "--teacher": weights,
        "--data": images,
        "--data.image_size": 16,
        "--epochs": 1,
        "--lr_schedule.warmup_epochs": 0,
        "--batch_size": 8,
        "--num_workers": 0,
        "--device": "cpu",
        "--output": tmp_path / "run",
    }
    assert main(["train", *(str(word) for pair in arguments.items() for word in pair)]) == 0
    assert capsys.readouterr().out.startswith("finished: ")
    assert main(
        ["train", *(str(word) for pair in (arguments | {"--teacher": "nothing_like_it"}).items() for word in pair)]
    )
