"""`slab detect predict`: a table, pictures, JSON; a picture that cannot be read costs a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from detectors import saved
from image_folders import picture
from slabformer.cli.detect.predict import picture_names
from slabformer.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("model") / "model.safetensors"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        picture(index, (90, 70)).save(folder / f"{index}.png")
    return folder


def test_what_is_found_is_shown_written_and_drawn(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, listed = tmp_path / "found", tmp_path / "found.json"
    assert (
        main(["detect", "predict", model, str(photos), "--score", "0", "--out", str(out), "--json", str(listed)]) == 0
    )
    shown = capsys.readouterr().out
    predictions = json.loads(listed.read_text())
    assert [Path(prediction["path"]).name for prediction in predictions] == ["0.png", "1.png"]
    assert all(prediction["size"] == [70, 90] for prediction in predictions)
    first = predictions[0]["objects"][0]
    assert first["name"] in shown
    assert f"{first['box'][2]:.1f}" in shown
    assert first["mask"]["size"] == [70, 90]
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png"]
    with Image.open(out / "0.png") as drawn, Image.open(photos / "0.png") as plain:
        assert drawn.size == plain.size
        assert drawn.tobytes() != plain.tobytes()


def test_brackets_in_a_name_are_no_markup(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "a[red]b[.png"
    picture(0, (90, 70)).save(photo)
    assert main(["detect", "predict", model, str(photo)]) == 0
    assert "a[red]b[.png" in "".join(capsys.readouterr().out.split("\n")).replace("│", "").replace(" ", "")


def test_asking_for_less_than_the_detectors_threshold_gives_more(
    model: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for score in ("0", "0.05", "1"):
        assert main(["detect", "predict", model, str(photos), "--score", score, "--json", "-"]) == 0
        counts.append(sum(len(prediction["objects"]) for prediction in json.loads(capsys.readouterr().out)))
    assert counts[0] >= counts[1] > counts[2] == 0


def test_an_unreadable_picture_costs_a_line_and_the_exit_code(
    model: str, photos: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = photos / "bad.png"
    bad.write_bytes(b"\x89PNG nothing more")
    assert main(["detect", "predict", model, str(bad), str(photos / "1.png"), "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert [prediction["error"] is None for prediction in json.loads(captured.out)] == [False, True]
    assert f"cannot read {bad}" in caplog.text
    assert "1 of 2 pictures could not be read" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors", "{photos}"], "none.safetensors"),
        (["none.onnx", "{photos}"], "got 'none.onnx': no such file"),
        (["{model}", "{photos}/*.gif"], "no file matches"),
    ],
    ids=["model", "onnx", "pattern"],
)
def test_mistakes_cost_a_line(
    arguments: list[str], message: str, model: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(model=model, photos=photos) for argument in arguments]
    assert main(["detect", "predict", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pictures_of_one_name_do_not_overwrite_each_other() -> None:
    paths = [Path("a/x.jpg"), Path("b/x.png"), Path("b/y.png"), Path("c/x.jpg")]
    assert picture_names(paths) == ["x.png", "x-2.png", "y.png", "x-3.png"]


@pytest.mark.slow
def test_an_exported_detector_finds_the_same_on_pictures_that_fill_its_canvas(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, photo = tmp_path / "detector.onnx", tmp_path / "photo.png"
    picture(0, (144, 96)).save(photo)  # 96x64 when resized
    assert main(["detect", "export", model, "--output", str(exported), "--size", "64", "96"]) == 0
    capsys.readouterr()
    found = []
    for file in (model, str(exported)):
        assert main(["detect", "predict", file, str(photo), "--score", "0.05", "--json", "-"]) == 0
        found.append([row for prediction in json.loads(capsys.readouterr().out) for row in prediction["objects"]])
    assert len(found[0]) == len(found[1]) > 0
    for ours, theirs in zip(*found, strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["box"] == pytest.approx(theirs["box"], abs=0.05)
