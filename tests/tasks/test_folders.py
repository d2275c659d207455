"""What is found in a folder of images: splits, classes and files, whatever they are called."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_folders import fill_classes, picture, write_shard
from slabformer._listing import NotRegularError, files_below, matches
from slabformer.cli.main import main
from slabformer.tasks.classification.config import DataConfig
from slabformer.tasks.classification.sources import open_source
from slabformer.tasks.images import UNREADABLE, expand_paths, image_suffixes, read_image

SPLITS = [
    ("Train", "Test"),
    ("Training", "Validation"),
    ("training_set", "test_set"),
    ("TRAIN", "VAL"),
    ("train", "valid"),
    ("train", "dev"),
    ("trainset", "testset"),
    ("train2017", "val2017"),
    ("Train_Images", "ValidationImages"),
]


IMAGES = ("a.gif", "b.GIF", "c.JPG", "d.Jpeg", "e.jfif", "f.tga", "g.jp2", "h [2020].png", "i.PPM")


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes both spellings for one")
def test_classes_that_look_alike_are_told_apart_in_words(tmp_path: Path) -> None:
    fill_classes(tmp_path / "both", {COMPOSED: 1, DECOMPOSED: 1})
    with pytest.raises(ValueError, match=r"one class under two spellings .*'cafe\\u0301' and 'caf\\xe9'; merge them"):
        open_source(DataConfig(path=str(tmp_path / "both")), "train")
    fill_classes(tmp_path / "train", {COMPOSED: 1, "dog": 1})
    fill_classes(tmp_path / "val", {DECOMPOSED: 1, "dog": 1})
    with pytest.raises(ValueError, match=r"val has class 'cafe\\u0301', which .*train has not"):
        open_source(DataConfig(path=str(tmp_path)), "validation")


@pytest.mark.parametrize(("train", "validation"), SPLITS, ids=lambda name: name)
def test_splits_are_found_whatever_they_are_called(train: str, validation: str, tmp_path: Path) -> None:
    fill_classes(tmp_path / train, {"cat": 2, "dog": 3})
    fill_classes(tmp_path / validation, {"cat": 1, "dog": 1})
    data = DataConfig(path=str(tmp_path))
    sources = [open_source(data, "train"), open_source(data, "validation")]
    assert [source.class_names for source in sources] == [["cat", "dog"]] * 2
    assert [len(source) for source in sources] == [5, 2]


def test_of_several_validation_splits_the_validation_set_is_taken(tmp_path: Path) -> None:
    for split, count in (("Train", 3), ("Val", 2), ("Test", 1)):
        fill_classes(tmp_path / split, {"cat": count, "dog": count})
    assert len(open_source(DataConfig(path=str(tmp_path)), "validation")) == 4


def test_several_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for split in ("train2014", "train2017", "val"):
        fill_classes(tmp_path / split, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"several folders for train: train2014, train2017; name one by data\.train"):
        open_source(DataConfig(path=str(tmp_path)), "train")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill_classes(tmp_path, {"bus": 5, "train": 5})
    source = open_source(DataConfig(path=str(tmp_path)), "train")
    assert (source.class_names, len(source)) == (["bus", "train"], 8)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["photos"], "a single class, 'photos', which leaves nothing to tell apart"),
        (["flowers/rose", "flowers/lily"], r"single class, 'flowers', .* is .*flowers what you mean\?"),
        (
            ["a_train/cat", "a_train/dog", "a_val/cat", "a_val/dog"],
            r"same sub-folders \(cat, dog\) and look like splits",
        ),
        (["train", "val"], "(train|val) holds no folders of classes"),
        (["train/cat", "val/cat"], "a single class, 'cat'"),
    ],
    ids=["one_folder", "one_level_too_high", "unknown_splits", "splits_without_classes", "one_class_in_splits"],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_folders_that_are_no_classes_are_refused(folders: list[str], message: str, split: str, tmp_path: Path) -> None:
    for folder in folders:
        fill_classes(tmp_path, {folder: 4})
    with pytest.raises(ValueError, match=message) as error:
        open_source(DataConfig(path=str(tmp_path)), split)
    assert "\n" not in str(error.value)


def test_images_are_told_by_what_pillow_opens_and_hidden_files_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_classes(tmp_path, {"cat": 1, "dog": 1, "__MACOSX": 1, ".cache": 1})
    for name in IMAGES:
        picture(1).save(tmp_path / "cat" / name)
    for name in ("._a.jpg", ".hidden.png", "Thumbs.db", ".DS_Store", "notes.txt", "clip.mpg", "data.h5", "paper.pdf"):
        (tmp_path / "cat" / name).write_bytes(b"no image")
    (tmp_path / "lost.png").write_bytes(b"beside the classes")
    source = open_source(DataConfig(path=str(tmp_path), validation_fraction=1), "validation")
    assert source.class_names == ["cat", "dog"]
    names = [Path(source.name(index)).name for index in range(len(source))]
    assert names == ["000.png", *IMAGES, "000.png"]
    assert "holds 1 images beside its folders of classes" in caplog.text
    for index in range(len(source)):
        assert source.read(index)[0].mode == "RGB"
    assert {".gif", ".jpg", ".tif", ".webp"} <= image_suffixes()


def test_folders_of_pictures_and_patterns_take_names_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "lm[v2]"
    folder.mkdir()
    for name in ("a.GIF", "b [1].png", "._b.png"):
        picture(0).save(folder / name, "PNG")
    assert [path.name for path in expand_paths([folder])] == ["a.GIF", "b [1].png"]
    assert matches(f"{folder}/*.png") == [str(folder / "b [1].png")]
    assert matches(str(folder / "b [1].png")) == [str(folder / "b [1].png")]


def test_links_to_a_folder_above_are_not_followed_and_others_once(tmp_path: Path) -> None:
    fill_classes(tmp_path / "data", {"cat": 2, "dog": 3})
    more = fill_classes(tmp_path, {"more": 2})
    for link, target in (
        ("data/cat/self", "data/cat"),
        ("data/cat/up", "data"),
        ("data/again", "data"),
        ("data/dog/more", "more"),
        ("data/dog/twice", "more"),
    ):
        (tmp_path / link).symlink_to(more / target if target == "more" else tmp_path / target)
    source = open_source(DataConfig(path=str(tmp_path / "data"), validation_fraction=1), "validation")
    assert source.class_names == ["cat", "dog"]
    labels = [label for _, label in source.files]
    assert (labels.count(0), labels.count(1)) == (2, 5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_named_pipes_and_sockets_are_refused_in_words(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(NotRegularError, match=r"pipe\.png is a named pipe, not a regular file"):
        read_image(tmp_path / "pipe.png")
    assert issubclass(NotRegularError, UNREADABLE)
    assert files_below(tmp_path, lambda name: True) == []
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(tmp_path)  # names of sockets are short
        listener.bind("s.png")
        os.chdir(here)
        with pytest.raises(NotRegularError, match="is a socket"):
            read_image(tmp_path / "s.png")


def test_shards_of_macos_and_of_several_splits_are_told_apart(tmp_path: Path) -> None:
    write_shard(tmp_path / "contest-TRAIN-0.TAR", {"a": (0, 1), "b": (1, 0), "._a": (2, 1)})
    write_shard(tmp_path / "contest-val-0.tar", {"c": (3, 1)})
    write_shard(tmp_path / "contest-test-0.tar", {"d": (4, 1)})
    write_shard(tmp_path / "._contest-train-1.tar", {"e": (5, 1)})
    data = DataConfig(path=f"wds/{tmp_path}")
    assert len(open_source(data, "train")) == 2
    validation = open_source(data, "validation")
    assert [validation.name(index) for index in range(len(validation))] == [f"{tmp_path}/contest-val-0.tar:c"]


def grey(values: np.ndarray, folder: Path, name: str) -> Path:
    Image.fromarray(values).save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("dtype", "highest", "name", "said"),
    [
        (np.uint16, 65535, "a.png", ""),
        (np.uint16, 4095, "b.png", "stored as 16 bits is taken as values of 12 bits"),
        (np.uint16, 255, "c.tif", "stored as 16 bits is taken as values of 8 bits"),
        (np.int32, 255, "d.tif", "stored as 32 bits is taken as values of 8 bits"),
        (np.int32, 65535, "e.tif", ""),
        (np.float32, 1, "f.tif", "stored as floats is taken as values in [0, 1]"),
        (np.float32, 255, "g.tif", "stored as floats is taken as values of 8 bits"),
        (np.float32, 65535, "h.tif", "stored as floats is taken as values of 16 bits"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_deep_grey_comes_out_as_bright_as_it_is(
    dtype: type,
    highest: float,
    name: str,
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slabformer.tasks.images._LOGGED_DEPTHS", set())
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    path = grey((ramp * highest).astype(dtype), tmp_path, name)
    for _ in range(2):
        read = np.asarray(read_image(path)).astype(int)
        assert read.shape == (16, 16, 3)
        assert np.abs(read[..., 0] - ramp * 255).max() <= 1
    assert caplog.text.count("taken as") == bool(said)
    assert said in caplog.text


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, float("nan")], [0.0, 1e6]], ids=str)
def test_grey_outside_every_scale_is_unreadable_in_words(values: list[float], tmp_path: Path) -> None:
    path = grey(np.array([values], np.float32), tmp_path, "a.tif")
    with pytest.raises(ValueError, match=r"its grey values run from .* allowed are 0 to 65535 or floats in \[0, 1\]"):
        read_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("p.pth", ["fuse", "slab_deit_tiny", "--output", "o.safetensors", "--checkpoint"]), ("p.csv", ["report"])],
    ids=["checkpoint", "benchmark"],
)
def test_no_command_waits_for_a_named_pipe(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    assert main([*arguments, name]) == 2
    assert f"{name} is a named pipe, not a regular file" in capsys.readouterr().err
