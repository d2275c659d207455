import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from image_folders import fill_classes, fill_splits
from slabformer.tasks.classification.config import AugmentConfig, DataConfig
from slabformer.tasks.classification.data import Loader, check_num_classes, create_loader

SMALL = {"image_size": 16, "crop_pct": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    return DataConfig(path=str(fill_splits(tmp_path)), **SMALL)


@pytest.fixture
def digits() -> DataConfig:
    return DataConfig(**SMALL)


def epoch_of(loader: Loader, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch)
    return list(loader)


def assert_same(batches: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])


def differ(batches: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    return any(not torch.equal(batch[0], other[0]) for batch, other in zip(batches, others, strict=True))


def test_batches_are_normalised_floats_and_integer_labels(folder: DataConfig) -> None:
    loader = create_loader(folder, AugmentConfig(), "train", batch_size=4, seed=0)
    images, labels = next(iter(loader))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert loader.class_names == ["cat", "dog", "owl"]
    assert len(loader) == 18 // 4


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(folder: DataConfig, num_workers: int) -> None:
    alone = create_loader(folder, AugmentConfig(), "train", batch_size=4, seed=3)
    shared = create_loader(folder, AugmentConfig(), "train", batch_size=4, seed=3, num_workers=num_workers)
    first, second = epoch_of(alone, 0), epoch_of(alone, 1)
    assert differ(first, second)
    assert_same(epoch_of(shared, 0), first)
    assert_same(epoch_of(shared, 1), second)  # the same, persistent workers


def test_global_generators_neither_matter_nor_move(folder: DataConfig) -> None:
    loader = create_loader(folder, AugmentConfig(), "train", batch_size=4, seed=3)
    first = epoch_of(loader, 0)
    random.seed(11), np.random.seed(11), torch.manual_seed(11)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(11), np.random.seed(11), torch.manual_seed(11)
    assert_same(epoch_of(loader, 0), first)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


@pytest.mark.parametrize("policy", ["timm", "light", "none"])
def test_an_epoch_can_start_in_the_middle(digits: DataConfig, policy: str) -> None:
    loader = create_loader(digits, AugmentConfig(policy=policy), "train", batch_size=400, seed=1)
    whole = epoch_of(loader, 2)
    loader.set_start(1)
    assert_same(epoch_of(loader, 2), whole[1:])
    assert_same(epoch_of(loader, 2), whole)  # the start holds once
    assert len(loader) == 3


def test_starting_in_the_middle_reads_nothing_before(folder: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = create_loader(folder, AugmentConfig(), "train", batch_size=4, seed=1)
    read = []
    original = loader.loader.dataset.source.read
    monkeypatch.setattr(loader.loader.dataset.source, "read", lambda index: read.append(index) or original(index))
    loader.set_start(3)
    assert len(list(loader)) == 1
    assert len(read) == 4


def test_a_start_past_the_epoch_is_refused(digits: DataConfig) -> None:
    loader = create_loader(digits, AugmentConfig(), "train", batch_size=400, seed=1)
    with pytest.raises(ValueError, match="cannot start at batch 4 of an epoch of 3"):
        loader.set_start(4)


@pytest.mark.parametrize("policy", ["timm", "light"])
def test_ranks_share_the_batches_of_one_process(digits: DataConfig, policy: str) -> None:
    augment = AugmentConfig(policy=policy)
    alone = epoch_of(create_loader(digits, augment, "train", batch_size=100, seed=5), 1)
    ranks = [
        epoch_of(create_loader(digits, augment, "train", batch_size=50, seed=5, rank=rank, world_size=2), 1)
        for rank in (0, 1)
    ]
    together = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(*ranks, strict=True)]
    assert_same(together, alone)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_sees_every_image_once(digits: DataConfig, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        loader = create_loader(
            digits, AugmentConfig(), "validation", batch_size=50, seed=0, rank=rank, world_size=world_size
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [image for images, _ in batches for image in images]
    assert len(seen) == 360
    assert len({image.numpy().tobytes() for image in seen}) == 360


def test_training_order_is_a_new_permutation_every_epoch(digits: DataConfig) -> None:
    loader = create_loader(digits, AugmentConfig(policy="none"), "train", batch_size=1437, seed=0)
    (first, _), (second, _) = epoch_of(loader, 0)[0], epoch_of(loader, 1)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values)


def test_images_in_memory_equal_those_read_one_by_one(digits: DataConfig) -> None:
    from slabformer.tasks.classification.augment import eval_transform
    from slabformer.tasks.classification.digits import DigitsSource

    images, labels = next(iter(create_loader(digits, AugmentConfig(), "validation", batch_size=20, seed=0)))
    source, transform = DigitsSource("validation"), eval_transform(digits)
    assert torch.equal(images, torch.stack([transform(source.read(index)[0]) for index in range(20)]))
    assert labels.tolist() == [source.read(index)[1] for index in range(20)]


def spoil(path: Path, how: str) -> Path:
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not an image", "truncated": content[: len(content) // 2]}[how])
    return path


@pytest.mark.parametrize("how", ["empty", "text", "truncated"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_named_once_and_replaced_alike(
    folder: DataConfig, how: str, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad = spoil(Path(folder.path, "train", "dog", "002.png"), how)
    folder.max_unreadable = 1
    with caplog.at_level(logging.WARNING):
        loader = create_loader(folder, AugmentConfig(), "train", batch_size=6, seed=0, num_workers=num_workers)
        first = epoch_of(loader, 0)
        assert_same(epoch_of(loader, 0), first)
    assert [len(labels) for _, labels in first] == [6, 6, 6]
    assert [str(bad) in record.message for record in caplog.records] == [True]


def test_unreadable_images_are_left_out_of_validation(folder: DataConfig) -> None:
    spoil(Path(folder.path, "val", "cat", "001.png"), "text")
    folder.max_unreadable = 1
    loader = create_loader(folder, AugmentConfig(), "validation", batch_size=1, seed=0)
    assert [labels.item() for _, labels in loader] == [0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("limit", "fatal"), [(0, True), (1, True), (2, False), (0.11, True), (0.12, False)])
def test_unreadable_images_are_fatal_above_the_limit(folder: DataConfig, limit: float, fatal: bool) -> None:
    for name in ("000.png", "001.png"):
        spoil(Path(folder.path, "train", "owl", name), "empty")
    folder.max_unreadable = limit
    loader = create_loader(folder, AugmentConfig(), "train", batch_size=6, seed=0)
    if fatal:
        with pytest.raises(RuntimeError, match=r"cannot be read \(first: .*owl/00"):
            list(loader)
    else:
        assert len(list(loader)) == 3


def test_a_folder_of_classes_is_divided_by_fraction(tmp_path: Path) -> None:
    data = DataConfig(path=str(fill_classes(tmp_path, {"a": 10, "b": 20})), **SMALL)
    train = create_loader(data, AugmentConfig(policy="none"), "train", batch_size=24, seed=0)
    validation = create_loader(data, AugmentConfig(), "validation", batch_size=24, seed=0)
    (images, labels), (held_images, held_labels) = next(iter(train)), next(iter(validation))
    assert torch.bincount(labels).tolist() == [8, 16]
    assert torch.bincount(held_labels).tolist() == [2, 4]
    assert len({image.numpy().tobytes() for image in torch.cat([images, held_images])}) == 30


def test_validation_classes_are_numbered_as_in_training(folder: DataConfig, tmp_path: Path) -> None:
    for file in (tmp_path / "val" / "cat").iterdir():
        file.unlink()
    (tmp_path / "val" / "cat").rmdir()
    loader = create_loader(folder, AugmentConfig(), "validation", batch_size=6, seed=0)
    assert next(iter(loader))[1].tolist() == [1, 1, 1, 2, 2, 2]


def test_a_validation_class_unknown_in_training_is_refused(folder: DataConfig, tmp_path: Path) -> None:
    fill_classes(tmp_path / "val", {"emu": 1})
    with pytest.raises(ValueError, match=r"val has class 'emu', which .*train has not"):
        create_loader(folder, AugmentConfig(), "validation", batch_size=2, seed=0)


def test_an_empty_class_is_named(folder: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "train" / "elk").mkdir()
    with pytest.raises(ValueError, match=r"class 'elk' is empty: no images in .*train/elk"):
        create_loader(folder, AugmentConfig(), "train", batch_size=2, seed=0)


def test_a_missing_split_says_what_was_looked_for(folder: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no validation images; looked for a sub-folder named val, valid"):
        create_loader(folder, AugmentConfig(), "validation", batch_size=2, seed=0)
    folder.validation_split = "elsewhere"
    assert len(create_loader(folder, AugmentConfig(), "validation", batch_size=2, seed=0)) == 5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no data at 'nowhere': no such folder"),
        ("torch/imaginary", "unknown data set 'torch/imaginary'"),
        ("tfds/imagenet", "'tfds/imagenet' is a stream"),
        ("wds/nowhere", "no shards at 'nowhere'"),
    ],
    ids=["folder", "torch", "tfds", "wds"],
)
def test_unknown_data_is_refused_in_one_line(path: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        create_loader(DataConfig(path=path), AugmentConfig(), "train", batch_size=2, seed=0)
    assert "\n" not in str(error.value)


def test_too_few_images_for_a_batch_are_refused(digits: DataConfig) -> None:
    with pytest.raises(ValueError, match="1437 training images do not fill one batch of 1000 x 2 ranks"):
        create_loader(digits, AugmentConfig(), "train", batch_size=1000, seed=0, world_size=2)


def test_light_augmentation_is_refused_where_it_cannot_work(folder: DataConfig) -> None:
    with pytest.raises(ValueError, match="policy 'light' is for data held in memory"):
        create_loader(folder, AugmentConfig(policy="light"), "train", batch_size=2, seed=0)


def test_a_wrong_number_of_classes_is_refused() -> None:
    check_num_classes(["a", "b"], 2)
    with pytest.raises(ValueError, match=r"the data has 2 classes \(a, b, ...\), the model 10"):
        check_num_classes(["a", "b"], 10)
