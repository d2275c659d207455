"""Several right classes an image, by file name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from image_folders import picture, write_shard
from slabformer.tasks.classification.config import AugmentConfig, DataConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.classification.evaluate import evaluate
from slabformer.tasks.classification.real_labels import NumberedSource, RealLabels
from slabformer.tasks.classification.sources import open_source

#: folder, name: the order of names is c, a, d, b by index
FILES = (("cat", "2.png"), ("cat", "4.png"), ("dog", "1.png"), ("owl", "3.png"))
LISTS = [[1], [0, 2], [], [2]]  # of 1.png, 2.png ...
#: classes that are right for image 0, 1, 2, 3
BY_INDEX = [{0, 2}, {2}, {1}, set()]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    for number, (folder, name) in enumerate(FILES):
        (tmp_path / "val" / folder).mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "val" / folder / name)
    (tmp_path / "real.json").write_text(json.dumps(LISTS))
    return DataConfig(path=str(tmp_path), image_size=8, crop_pct=1.0, max_unreadable=2)


def real_labels(data: DataConfig) -> RealLabels:
    return RealLabels.load(Path(data.path) / "real.json", open_source(data, "validation"))


class Always(nn.Module):
    """The same class for every image."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(3)[self.label].expand(len(x), 3)


def figures(data: DataConfig, label: int, **loading: int):
    source = NumberedSource(open_source(data, "validation"))
    loader = create_loader(data, AugmentConfig(), "validation", batch_size=3, seed=0, source=source, **loading)
    return evaluate(Always(label), loader, real=real_labels(data), per_class=True)


def test_lists_are_matched_by_file_name(data: DataConfig) -> None:
    accepted = real_labels(data).accepted.tolist()
    assert [{label for label in row if label >= 0} for row in accepted] == BY_INDEX


@pytest.mark.parametrize("label", [0, 1, 2])
def test_any_accepted_class_is_right_and_images_without_one_are_left_out(label: int, data: DataConfig) -> None:
    result = figures(data, label)
    assert (result.images, result.real_images) == (4, 3)
    assert result.real_top1 == pytest.approx(sum(label in classes for classes in BY_INDEX) / 3)
    assert result.top1 == [2 / 4, 1 / 4, 1 / 4][label]
    assert result.per_class is not None
    assert [row.images for row in result.per_class] == [2, 1, 1]


def test_an_unreadable_image_does_not_shift_the_others(data: DataConfig) -> None:
    (Path(data.path) / "val" / "cat" / "2.png").write_text("no image")
    result = figures(data, 2)
    assert (result.images, result.real_images, result.real_top1) == (3, 2, 1 / 2)


def test_ranks_add_up(data: DataConfig) -> None:
    parts = [figures(data, 2, rank=rank, world_size=2) for rank in (0, 1)]
    assert sum(part.real_images or 0 for part in parts) == 3


def test_without_real_labels_nothing_is_said_of_them(data: DataConfig) -> None:
    loader = create_loader(data, AugmentConfig(), "validation", batch_size=3, seed=0)
    result = evaluate(Always(0), loader)
    assert (result.real_top1, result.real_images) == (None, None)


def test_shards_go_by_their_keys(tmp_path: Path) -> None:
    write_shard(tmp_path / "val-0.tar", {"b": (0, 0), "c": (1, 1)})
    write_shard(tmp_path / "val-1.tar", {"a": (2, 0)})
    (tmp_path / "real.json").write_text("[[0], [1], [0, 1]]")
    source = open_source(DataConfig(path=f"wds/{tmp_path}"), "validation")
    assert RealLabels.load(tmp_path / "real.json", source).accepted.tolist() == [[1, -1], [0, 1], [0, -1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0], [1]]", "has labels of 2 images, the data has 4"),
        ("[[0], [1], [2], [3]]", "has labels up to 3, the data 3 classes"),
        ('{"a": [0]}', "is not a list of lists of classes"),
        ("[0, 1, 2, 2]", "is not a list of lists of classes"),
        ("[[0], ", "is not JSON"),
    ],
    ids=["count", "classes", "mapping", "flat", "cut-short"],
)
def test_files_of_something_else_are_refused(text: str, message: str, data: DataConfig) -> None:
    (Path(data.path) / "real.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        real_labels(data)


def test_names_must_tell_images_apart(data: DataConfig) -> None:
    picture(9).save(Path(data.path) / "val" / "owl" / "1.png")
    with pytest.raises(ValueError, match=r"2 images are called 1.png"):
        real_labels(data)


def test_data_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[0]]")
    with pytest.raises(ValueError, match="real labels go by the names of image files"):
        RealLabels.load(tmp_path / "real.json", open_source(DataConfig(), "validation"))
