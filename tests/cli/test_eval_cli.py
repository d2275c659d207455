import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from children import ended
from csv_files import csv_rows
from image_folders import fill_classes, fill_splits, picture
from saved_digits import digits_model, save_digits_model
from slabformer.cli.main import main
from slabformer.tasks.classification.config import AugmentConfig, DataConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.classification.evaluate import EvalResult, evaluate
from tolerances import PATIENCE


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_digits_model(tmp_path_factory.mktemp("model") / "model.safetensors"))


def by_hand() -> EvalResult:
    data = DataConfig(image_size=16, crop_pct=1.0, mean=(0.3,) * 3, std=(0.4,) * 3)
    loader = create_loader(data, AugmentConfig(), "validation", batch_size=128, seed=0)
    return evaluate(digits_model(), loader, per_class=True)


def test_the_table_shows_what_evaluate_finds(model_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", model_file, "--data", "digits", "--device", "cpu"]) == 0
    expected, shown = by_hand(), capsys.readouterr().out
    assert "slab_deit_micro on digits" in shown
    for figure in (f"{100 * expected.top1:.2f}", f"{100 * (expected.top5 or 0):.2f}", f"{expected.loss:.4f}", "360"):
        assert figure in shown


def test_figures_go_to_json_and_classes_to_csv(
    model_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "classes.csv"
    assert main(["eval", model_file, "--data", "digits", "--json", "-", "--per-class", str(rows)]) == 0
    figures, expected = json.loads(capsys.readouterr().out)["deployed"], by_hand()
    assert (figures["top1"], figures["images"]) == (expected.top1, 360)
    table = csv_rows(rows)
    assert [row["class"] for row in table] == [str(digit) for digit in range(10)]
    hits = sum(round(float(row["top1"]) * int(row["images"])) for row in table)
    assert hits == round(expected.top1 * 360)


def test_fused_is_as_good(model_file: str, tmp_path: Path) -> None:
    assert main(["eval", model_file, "--data", "digits", "--fused", "--json", str(tmp_path / "r.json")]) == 0
    figures = json.loads((tmp_path / "r.json").read_text())["fused"]
    assert figures["loss"] == pytest.approx(by_hand().loss, rel=1e-4)


def test_real_labels_have_a_column_of_their_own(
    model_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for digit in range(10):
        (tmp_path / "val" / str(digit)).mkdir(parents=True)
        picture(digit).save(tmp_path / "val" / str(digit) / f"{digit}.png")
    (tmp_path / "real.json").write_text(json.dumps([list(range(10))] * 9 + [[]]))
    result = tmp_path / "result.json"
    arguments = ["--data", str(tmp_path), "--real-labels", str(tmp_path / "real.json"), "--num-workers", "0"]
    assert main(["eval", model_file, *arguments, "--json", str(result)]) == 0
    assert "real top-1 %" in capsys.readouterr().out
    figures = json.loads(result.read_text())["deployed"]
    assert (figures["real_top1"], figures["real_images"], figures["images"]) == (1.0, 9, 10)


@pytest.mark.slow
def test_two_processes_count_every_image_once_and_print_once(model_file: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, "-m", "slabformer.cli.main", "eval", model_file, "--data", "digits", "--device", "cpu"]
    command += ["--batch-size", "50", "--per-class", str(tmp_path / "rows.csv"), "--json", str(tmp_path / "r.json")]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    with ended(ranks):
        printed = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert ["slab_deit_micro on digits" in text for text in printed] == [True, False]
    figures, expected = json.loads((tmp_path / "r.json").read_text())["deployed"], by_hand()
    assert (figures["images"], figures["top1"]) == (360, pytest.approx(expected.top1))
    assert figures["loss"] == pytest.approx(expected.loss, rel=1e-5)


def test_the_blend_is_shown_while_gamma_is_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_digits_model(tmp_path / "half.safetensors", gamma=0.5)
    assert main(["eval", str(file), "--data", "digits", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == ["deployed", "blend, gamma 0.50"]
    assert figures["deployed"]["loss"] != figures["blend, gamma 0.50"]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slab_deit_micro", "--data", "digits"], "'slab_deit_micro' names a model without weights"),
        (["none.safetensors", "--data", "digits"], "no model at 'none.safetensors'"),
        (["MODEL", "--data", "nowhere"], "no data at 'nowhere': no such folder"),
        (["MODEL", "--data", "FOLDER"], "the data has 3 classes (cat, dog, owl, ...), the model 10"),
        (["MODEL", "--data", "digits", "--device", "abacus"], "--device must be auto, or a device such as cpu"),
        (["MODEL", "--data", "digits", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["MODEL"], "data"),
    ],
    ids=["no-weights", "no-file", "no-data", "wrong-classes", "no-device", "batch-size", "data-forgotten"],
)
def test_mistakes_cost_one_line(
    arguments: list[str], message: str, model_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_splits(tmp_path)
    given = [{"MODEL": model_file, "FOLDER": str(tmp_path)}.get(argument, argument) for argument in arguments]
    assert main(["eval", *given, "--num-workers", "0"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint
    assert "\n" not in complaint.partition("slab: ")[2]


def test_too_many_unreadable_images_are_a_failure(
    tmp_path: Path, model_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for digit in range(10):
        (tmp_path / "val" / str(digit)).mkdir(parents=True)
        (tmp_path / "val" / str(digit) / "a.png").write_text("no image")
    assert main(["eval", model_file, "--data", str(tmp_path), "--num-workers", "0"]) == 1
    assert "10 images cannot be read" in capsys.readouterr().err


def test_classes_of_other_names_are_warned_about(
    tmp_path: Path, model_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill_classes(tmp_path / "val", {f"digit-{digit}": 1 for digit in range(10)})
    assert main(["eval", model_file, "--data", str(tmp_path), "--num-workers", "0"]) == 0
    assert "10 classes are named otherwise" in caplog.text


def test_an_unknown_name_is_called_unknown_and_the_nearest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "slab_deit_tinny", "--data", "digits"]) == 2
    assert "unknown model 'slab_deit_tinny'; did you mean 'slab_deit_tiny'?" in capsys.readouterr().err
