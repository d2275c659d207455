"""Names that come from data stay in their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coco_files import write_root
from slabformer.tasks.detection.check import check_data
from slabformer.tasks.detection.config import DetectionData
from slabformer.tasks.detection.dataset import open_source
from slabformer.tasks.paths import path_inside

OUTSIDE = ["/etc/passwd", "../secret.png", "a/../../secret.png", "C:\\secret.png", "..\\secret.png", "\\\\host\\share"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leaves the folder .*: give names below it"):
        path_inside(tmp_path, name)


@pytest.mark.parametrize("name", [None, 7, "", " ", "a\0b", ["a.png"]], ids=str)
def test_what_is_no_name_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the name of a file"):
        path_inside(tmp_path, name)


@pytest.mark.parametrize("name", ["1.png", "a/b/1.png", "./1.png", "..1.png", "a..b/1.png", "missing/2.png"])
def test_a_name_below_the_folder_is_taken(name: str, tmp_path: Path) -> None:
    assert path_inside(tmp_path, name) == tmp_path / name


def test_links_out_of_the_folder_are_refused_and_those_above_it_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_text("secret")
    (real / "images" / "file.png").symlink_to(tmp_path / "secret.png")
    (real / "images" / "folder").symlink_to(tmp_path)
    (real / "images" / "1.png").write_text("image")
    (real / "images" / "inside.png").symlink_to("1.png")
    (tmp_path / "data").symlink_to(real / "images")
    for name in ("file.png", "folder/secret.png"):
        with pytest.raises(ValueError, match="it is a link to"):
            path_inside(tmp_path / "data", name)
    for name in ("1.png", "inside.png"):
        assert path_inside(tmp_path / "data", name).read_text() == "image"


@pytest.mark.parametrize("name", ["ABSOLUTE", "../val2017/1.png"])
def test_coco_files_name_images_of_their_folder_alone(name: str, tmp_path: Path) -> None:
    root = write_root(tmp_path)
    name = str(root / "val2017" / "1.png") if name == "ABSOLUTE" else name
    file = root / "annotations" / "instances_train2017.json"
    dataset = json.loads(file.read_text())
    dataset["images"][0]["file_name"] = name
    file.write_text(json.dumps(dataset))
    with pytest.raises(ValueError) as refused:
        open_source(DetectionData(path=str(root)), "train")
    assert f"{file}: file_name of image 1: {name!r} leaves the folder" in str(refused.value)
    findings = check_data(DetectionData(path=str(root)))[0].findings
    assert any("file_name leaves" in finding.what and finding.stops for finding in findings)
