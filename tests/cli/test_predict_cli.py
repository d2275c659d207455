import json
from pathlib import Path

import pytest

from image_folders import picture
from saved_digits import save_digits_model
from slabformer.cli.main import main


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_digits_model(tmp_path_factory.mktemp("model") / "model.safetensors"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    return tmp_path


def test_every_image_gets_its_five_classes(model_file: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", model_file, str(photos / "0.png"), str(photos), "--json", "-"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert [Path(prediction["path"]).name for prediction in predictions] == ["0.png", "0.png", "1.png", "2.png"]
    for prediction in predictions:
        probabilities = [guess["probability"] for guess in prediction["guesses"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)


def test_the_table_names_images_and_classes(model_file: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = photos / "out.json"
    assert main(["predict", model_file, str(photos / "1.png"), "--top", "2", "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    (prediction,) = json.loads(written.read_text())
    assert "1.png" in shown.replace("\n", "")
    for guess in prediction["guesses"]:
        assert f"{100 * guess['probability']:.2f} %" in shown
    assert len(prediction["guesses"]) == 2


def test_an_unreadable_image_costs_a_line_and_the_exit_code(
    model_file: str, photos: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = photos / "bad.png"
    bad.write_bytes(b"\x89PNG nothing more")
    assert main(["predict", model_file, str(bad), str(photos / "2.png"), "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert [bool(prediction["guesses"]) for prediction in json.loads(captured.out)] == [False, True]
    assert f"cannot read {bad}" in caplog.text
    assert "1 of 2 images could not be read" in captured.err


def test_a_model_without_weights_is_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "slab_deit_micro", str(photos)]) == 2
    assert "names a model without weights" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--help"])
    assert stop.value.code == 0
    assert "  slab predict runs/digits/model.safetensors digit.png\n" in capsys.readouterr().out
