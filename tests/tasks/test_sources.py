import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_folders import fill_splits, picture, write_shard
from slabformer.tasks.classification.config import DataConfig
from slabformer.tasks.classification.sources import open_source
from slabformer.tasks.images import read_image


@pytest.fixture
def shards(tmp_path: Path) -> DataConfig:
    write_shard(tmp_path / "birds-train-00.tar", {"a.b/0": (0, 1), "a.b/1": (1, 0), "a/b": (2, 1)})
    write_shard(tmp_path / "birds-train-01.tar", {"c": (3, 2)})
    write_shard(tmp_path / "birds-val-00.tar", {"d": (4, 0)})
    return DataConfig(path=f"wds/{tmp_path}")


def test_shards_are_read_at_random(shards: DataConfig) -> None:
    source = open_source(shards, "train")
    assert source.class_names == ["0", "1", "2"]
    order = [3, 0, 2]
    read = [source.read(index) for index in order]
    assert [label for _, label in read] == [2, 1, 1]
    for (image, _), seed in zip(read, order, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(picture(seed)))
    assert len(open_source(shards, "validation")) == 1


def test_shards_can_be_named_by_pattern_and_by_info_file(shards: DataConfig, tmp_path: Path) -> None:
    shards.train_split = "birds-train-{00..01}.tar"
    assert len(open_source(shards, "train")) == 4
    shards.train_split = "*-01.tar"
    assert len(open_source(shards, "train")) == 1
    info = {"splits": {"small": {"filenames": ["birds-train-01.tar"]}, "gone": {"filenames": ["lost.tar"]}}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    shards.train_split = "small"
    assert len(open_source(shards, "train")) == 1
    shards.train_split = "gone"
    with pytest.raises(ValueError, match=r"lost.tar is listed but missing"):
        open_source(shards, "train")


def test_shards_name_their_classes_by_file(shards: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("wren\nrook\nkite\n")
    assert open_source(shards, "validation").class_names == ["wren", "rook", "kite"]
    (tmp_path / "classnames.txt").write_text("wren\nrook\n")
    with pytest.raises(ValueError, match="names 2 classes, labels in the shards reach 2"):
        open_source(shards, "train")


def test_shards_without_labels_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", {"a": (0, 1), "b": (1, -1)})
    with pytest.raises(ValueError, match=r"1 images without a .cls label \(first: b\)"):
        open_source(DataConfig(path=f"wds/{tmp_path}"), "train")
    (tmp_path / "train-0.tar").write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match="is not an uncompressed tar"):
        open_source(DataConfig(path=f"wds/{tmp_path}"), "train")
    with pytest.raises(ValueError, match="no shard for 'validation'"):
        open_source(DataConfig(path=f"wds/{tmp_path}"), "validation")


def test_torchvision_data_sets_open_by_timm_name(tmp_path: Path) -> None:
    fill_splits(tmp_path)
    source = open_source(DataConfig(path="torch/image_folder", root=str(tmp_path)), "validation")
    assert source.class_names == ["cat", "dog", "owl"]
    image, label = source.read(4)
    assert (image.mode, label, len(source)) == ("RGB", 1, 9)


def test_a_torchvision_data_set_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot open 'torch/cifar10' .* data.download=true"):
        open_source(DataConfig(path="torch/cifar10", root=str(tmp_path)), "train")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="only without Hugging Face's datasets")
def test_hugging_face_data_sets_name_the_missing_package() -> None:
    with pytest.raises(ImportError, match=r"'hfds/beans' needs Hugging Face's datasets; pip install datasets"):
        open_source(DataConfig(path="hfds/beans"), "train")


def encode(image: Image.Image, **options: object) -> io.BytesIO:
    content = io.BytesIO()
    image.save(content, "PNG", **options)
    content.seek(0)
    return content


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_mode_is_read_as_rgb(mode: str) -> None:
    content = io.BytesIO()
    grey = Image.new("L", (5, 4), 200)
    image = Image.fromarray(np.full((4, 5), 200 * 257, np.uint16)) if mode == "I;16" else grey.convert(mode)
    image.save(content, "TIFF" if mode == "CMYK" else "PNG")
    content.seek(0)
    read = read_image(content)
    assert (read.mode, read.size) == ("RGB", (5, 4))
    expected = 255 if mode == "1" else 200
    assert np.abs(np.asarray(read).astype(int).mean() - expected) < (60 if mode == "1" else 2)


def test_transparency_is_laid_on_white() -> None:
    assert read_image(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(encode(Image.new("P", (2, 2), 0), transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_images_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    lying = Image.new("RGB", (6, 4))
    lying.putpixel((0, 3), (255, 0, 0))
    upright = read_image(encode(lying, exif=exif))
    assert upright.size == (4, 6)
    assert upright.getpixel((0, 0)) == (255, 0, 0)


def test_reading_leaves_the_transform_a_plain_copy(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert torch.equal(torch.from_numpy(np.array(read)), torch.from_numpy(np.array(picture(0))))
