"""`slab detect train` and `slab detect eval`: a recipe in, a folder and figures out; mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from coco_files import write_root
from csv_files import csv_rows
from detectors import saved
from slabformer.cli.main import main
from tiny_detection import NO_STEPS, tiny_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    config = tiny_config(tmp_path / "run", epochs=1, lr_schedule=NO_STEPS).to_dict()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    return path


def slab(*arguments: object) -> int:
    return main(["detect", *map(str, arguments)])


def test_a_recipe_makes_a_detector_and_its_baseline_beside_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slab("train", "--config", recipe, "--baseline", "true") == 0
    captured = capsys.readouterr()
    assert f"finished: {tmp_path / 'run'}  box_ap " in captured.out
    assert "LayerNorm baseline" in captured.out
    assert "epoch 1/1  step 2/2" in captured.err
    assert (tmp_path / "run" / "baseline" / "model.safetensors").exists()
    assert slab("train", "--config", tmp_path / "run" / "config.yaml") == 0
    assert capsys.readouterr().out.startswith(f"already finished: {tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown option '--epoch'; did you mean '--epochs'?"),
        (["--model.freeze", "auto"], "did you mean '--model.freeze-norms'?"),
        (["--detector.fpn_channel", "8"], "did you mean '--detector.fpn-channels'?"),
        (["--model.backbone", "slab_swin_tinny"], "did you mean 'slab_swin_tiny'?"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--model.weights", "none.safetensors"], "no weights at 'none.safetensors'"),
        (["--lr-schedule.warmup-steps", "9"], "warmup_steps (9) must be below the 2 steps"),
        (["--detector.roi-iou", "2"], "--detector.roi-iou must be in [0, 1], got 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slab("train", "--config", recipe, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def add_category(annotations: Path) -> None:
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 99, "name": "yak"})
    annotations.write_text(json.dumps(content))


def test_other_categories_in_validation_than_in_training_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_category(tmp_path / "coco" / "annotations" / "instances_val2017.json")
    assert slab("train", "--config", recipe) == 2
    assert "different categories (first: 99, 'yak')" in capsys.readouterr().err


def test_other_classes_than_the_checkpoint_s_are_refused_with_the_way_out(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved(tmp_path / "start.safetensors")
    for split in ("train", "val"):
        add_category(tmp_path / "coco" / "annotations" / f"instances_{split}2017.json")
    assert slab("train", "--config", recipe, "--model.weights", weights) == 2
    error = capsys.readouterr().err
    assert "knows 3 classes, the data 4" in error
    assert "--model.new-predictors drops" in error
    assert slab("train", "--config", recipe, "--model.weights", weights, "--model.new-predictors") == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("saved") / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("coco") / "root")


def test_eval_prints_and_writes_figures_classes_and_detections(
    model: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"{name}.out" for name in ("classes", "results", "json")}
    options = [f"--{name}={path}" for name, path in files.items()]
    assert slab("eval", model, "--data", root, "--device", "cpu", *options) == 0
    printed = capsys.readouterr().out
    assert "deployed, boxes" in printed
    assert "deployed, masks" in printed
    figures = json.loads(files["json"].read_text())
    assert figures["deployed"]["num_images"] == 3
    assert len(figures["deployed"]["box"]) == len(figures["deployed"]["mask"]) == 12
    objects = [(row["name"], row["num_objects"]) for row in csv_rows(files["classes"])]
    assert objects == [("cat", "3"), ("dog", "0"), ("owl", "3")]
    detections = json.loads(files["results"].read_text())
    assert detections
    assert {frozenset(row) for row in detections} == {
        frozenset({"image_id", "category_id", "bbox", "score", "segmentation"})
    }
    assert {row["category_id"] for row in detections} <= {3, 7, 90}


def test_boxes_alone_are_evaluated_where_annotations_have_no_masks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "root")
    annotations = root / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    annotations.write_text(json.dumps(content))
    assert slab("eval", model, "--data", root, "--device", "cpu") == 2
    assert "have no mask" in capsys.readouterr().err
    assert slab("eval", model, "--data", root, "--device", "cpu", "--boxes") == 0
    printed = capsys.readouterr().out
    assert "deployed, boxes" in printed
    assert "masks" not in printed


@pytest.mark.slow
def test_a_fused_detector_has_the_same_figures(model: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for options in ([], ["--fused"]):
        assert slab("eval", model, "--data", root, "--device", "cpu", "--json", "-", *options) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1].keys() == {"fused"}
    assert results[1]["fused"]["box"] == pytest.approx(results[0]["deployed"]["box"], nan_ok=True)


def test_explicit_paths_do_without_a_root(model: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--images", root / "val2017", "--annotations", root / "annotations" / "instances_val2017.json"]
    assert slab("eval", model, *paths, "--device", "cpu") == 0
    assert slab("eval", model, "--images", root / "val2017") == 2
    assert "which images? give --data FOLDER" in capsys.readouterr().err


def test_another_number_of_classes_in_the_data_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "root")
    add_category(root / "annotations" / "instances_val2017.json")
    assert slab("eval", model, "--data", root, "--device", "cpu") == 2
    assert "knows 3 classes, the data 4" in capsys.readouterr().err
