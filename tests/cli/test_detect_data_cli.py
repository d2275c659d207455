"""`slab detect check-data | browse | digits`: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coco_files import write_root
from slabformer.cli.main import main


def test_good_data_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "check-data", "--data", str(write_root(tmp_path)), "--decode"]) == 0
    shown = capsys.readouterr().out
    assert "train: 6 images, 12 objects" in shown
    assert "owl" in shown


def test_fix_writes_annotations_that_train_and_says_how_to_use_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "data")
    path = root / "annotations" / "instances_train2017.json"
    dataset = json.loads(path.read_text())
    dataset["annotations"][0]["iscrowd"] = "0"
    dataset["annotations"][1]["bbox"] = None
    path.write_text(json.dumps(dataset))
    assert main(["detect", "check-data", "--data", str(root)]) == 1
    assert "iscrowd must be 0 or 1" in capsys.readouterr().err
    output = tmp_path / "mended"
    assert main(["detect", "check-data", "--data", str(root), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "mended 1: annotations: iscrowd must be 0 or 1" in said
    assert "left out 1: annotations: bbox must be four numbers from -131072 to 131072" in said
    options = said[said.index("use them with ") + len("use them with ") :].split()
    assert main(["detect", "check-data", "--data", str(root), *options]) == 0


def test_bad_data_is_told_whole_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_root(tmp_path) / "train2017" / "2.png").unlink()
    assert main(["detect", "check-data", "--data", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    train, validation = json.loads(captured.out)
    assert train["stops"]
    assert not validation["stops"]
    assert train["findings"][0]["examples"] == ["2.png"]
    assert "the data cannot be used as it is: images that are not in" in captured.err


def test_missing_annotations_cost_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "check-data", "--data", str(tmp_path)]) == 2
    assert "no annotations at" in capsys.readouterr().err


def test_digits_are_written_checked_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, drawn = tmp_path / "digits", tmp_path / "drawn.png"
    assert main(["detect", "digits", "--output", str(root), "--num-train", "5", "--num-validation", "2"]) == 0
    assert capsys.readouterr().out == f"wrote {root}\n"
    assert main(["detect", "check-data", "--data", str(root)]) == 0
    assert main(["detect", "browse", "--data", str(root), "--output", str(drawn), "--num", "5"]) == 0
    with Image.open(drawn) as image:
        assert image.size == (4 * 324, 2 * 324)
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 1000
    assert main(["detect", "digits", str(root)]) == 2  # the folder by its place, as before 0.2
    assert "is there already" in capsys.readouterr().err
    assert main(["detect", "digits"]) == 2
    assert "give one folder: --output FOLDER" in capsys.readouterr().err


def test_a_picture_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "browse", "-o", str(tmp_path / "none" / "a.png")]) == 2
    assert "no folder" in capsys.readouterr().err
