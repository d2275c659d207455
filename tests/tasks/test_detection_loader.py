"""Detection batches hang on (seed, epoch, index) alone, and bad input costs a line."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coco_files import coco_dataset, coco_object, two_objects_each, write_root, write_split
from image_folders import picture
from slabformer.tasks.detection.config import DetectionAugment, DetectionData
from slabformer.tasks.detection.loader import DetectionBatch, DetectionLoader, create_loader
from slabformer.tasks.engine.devices import to_device
from slabformer.tasks.engine.nonfinite import tensors_in
from slabformer.tasks.engine.parts import num_samples

AUGMENT = DetectionAugment(sizes=(40, 56), crop_sizes=(44, 52), crop_range=(32, 48), size=48, max_size=80)
PLAIN = DetectionAugment(policy="none", size=48, max_size=80)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("coco"))


def loader_of(path: Path | str, split: Any = "train", augment: DetectionAugment = AUGMENT, **changes: Any) -> Any:
    options = {"batch_size": 2, "seed": 0}
    options |= {
        key: changes.pop(key) for key in ("batch_size", "seed", "rank", "world_size", "num_workers") & changes.keys()
    }
    return create_loader(DetectionData(path=str(path), **changes), augment, split, **options)


def tensors_of(loader: DetectionLoader) -> list[torch.Tensor]:
    return [tensor for batch in loader for tensor in tensors_in(batch)]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def train_objects(*objects: dict[str, Any], sizes: list[tuple[int, int]] | None = None) -> dict[str, Any]:
    return coco_dataset(sizes or [(64, 48)], list(objects))


def test_a_batch_holds_images_and_targets_as_the_detector_takes_them(root: Path) -> None:
    for batch in loader_of(root):
        assert isinstance(batch, DetectionBatch)
        assert len(batch) == num_samples(batch) == 2
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert image.dtype == torch.float32
            assert 0 <= image.min() < image.max() <= 1
            count = len(target["boxes"])
            assert target["boxes"].shape == (count, 4)
            assert target["labels"].dtype == torch.int64
            assert set(target["labels"].tolist()) <= {1, 3}
            assert target["masks"].shape == (count, *image.shape[-2:])
            assert target["masks"].dtype == torch.uint8
            assert target["name"] == f"{target['image_id']}.png"
            assert sorted(target["original_size"]) == [48, 64]


def test_a_batch_moves_to_the_device_whole(root: Path) -> None:
    batch = next(iter(loader_of(root)))
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, DetectionBatch)
    assert {tensor.device.type for tensor in tensors_in(moved)} == {"meta"}
    assert [target["name"] for target in moved.targets] == [target["name"] for target in batch.targets]


def test_validation_gives_every_image_once_in_order_at_one_size(root: Path) -> None:
    loader = loader_of(root, "validation")
    targets = [target for batch in loader for target in batch.targets]
    assert [target["image_id"] for target in targets] == [1, 2, 3]
    assert [tuple(image.shape[1:]) for batch in loader for image in batch.images] == [(48, 64), (64, 48), (48, 64)]
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([[4.0, 6, 24, 16], [10, 18, 22, 32]]))
    assert loader.class_names == ["cat", "dog", "owl"]
    assert loader.category_ids == [3, 7, 90]


def test_batches_follow_seed_and_epoch(root: Path) -> None:
    first = tensors_of(loader_of(root))
    assert_same(first, tensors_of(loader_of(root)))
    loader = loader_of(root)
    loader.set_epoch(1)
    assert not torch.equal(first[0], tensors_of(loader)[0])
    assert not torch.equal(first[0], tensors_of(loader_of(root, seed=1))[0])


def test_an_epoch_goes_on_in_its_middle(root: Path) -> None:
    loader = loader_of(root)
    whole = list(loader)
    loader.set_start(2)
    rest = list(loader)
    assert len(loader) == len(whole) == len(rest) + 2
    assert_same([*tensors_in(whole[2:])], [*tensors_in(rest)])
    with pytest.raises(ValueError, match="cannot start at batch 9"):
        loader.set_start(9)


def test_the_global_generator_stands_still(root: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(loader_of(root))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_workers_change_nothing(root: Path) -> None:
    assert_same(tensors_of(loader_of(root)), tensors_of(loader_of(root, num_workers=2)))


@pytest.mark.parametrize("path", ["digits", "files"])
def test_workers_can_be_started_afresh(path: str, root: Path) -> None:
    """Where processes are not forked, the data set is pickled."""
    dataset = loader_of(path if path == "digits" else root, "validation").dataset
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset[0, 1].image, copied[0, 1].image)


def test_ranks_share_the_batches_of_one(root: Path) -> None:
    halves = [loader_of(root, batch_size=1, rank=rank, world_size=2) for rank in range(2)]
    for whole, first, second in zip(loader_of(root), *halves, strict=True):
        both = DetectionBatch([*first.images, *second.images], [*first.targets, *second.targets])
        assert_same([*tensors_in(whole)], [*tensors_in(both)])


def test_the_names_of_a_batch_are_told_without_reading_it(root: Path) -> None:
    loader = loader_of(root)
    loader.set_epoch(3)
    names = [[target["name"] for target in batch.targets] for batch in loader]
    assert [loader.batch_names(index) for index in range(len(loader))] == names


@pytest.mark.parametrize("path", ["nowhere", "digits"])
def test_explicit_paths_override_the_layout_and_the_digits(path: str, root: Path) -> None:
    loader = loader_of(
        path,
        train_images=str(root / "val2017"),
        train_annotations=str(root / "annotations" / "instances_val2017.json"),
    )
    assert len(loader.dataset) == 3


def test_training_sees_usable_objects_only_and_says_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = coco_object(1, 1, [4, 6, 20, 10])
    bad = [
        coco_object(2, 1, [4, 6, 0, 10]),
        coco_object(3, 1, [4, 6, 9, 9], category=55),
        coco_object(4, 1, [4, 6, 9, 9], iscrowd=1, segmentation={"size": [48, 64], "counts": [3072]}),
        coco_object(5, 2, [4, 6, 9, 9], category=55),
    ]
    dataset = train_objects(good, *bad, sizes=[(64, 48), (64, 48), (64, 48), (64, 31)])
    dataset["annotations"].append(coco_object(6, 4, [4, 6, 9, 9]))
    write_split(tmp_path, "train", dataset)
    with caplog.at_level(logging.INFO):
        loader = loader_of(tmp_path, augment=PLAIN, batch_size=1)
    (batch,) = loader
    assert [target["boxes"].tolist() for target in batch.targets] == [[[4, 6, 24, 16]]]
    assert "2 images without a usable object, 1 images below 32 px" in caplog.text
    assert "1 objects crowds, 2 objects of unknown category, 1 objects without area" in caplog.text


def test_a_data_set_without_a_usable_object_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", train_objects(coco_object(1, 1, [4, 6, 0, 10])))
    with pytest.raises(ValueError, match=r"no image .* can be trained on .*1 objects without area"):
        loader_of(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(coco_dataset([], [])))
    with pytest.raises(ValueError, match=r"no image of .* can be trained on"):
        loader_of(tmp_path)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_annotations_without_masks_are_refused_unless_for_boxes_alone(split: str, tmp_path: Path) -> None:
    dataset = train_objects(coco_object(7, 1, [4, 6, 20, 10], segmentation=[]))
    write_split(tmp_path, "train" if split == "train" else "val", dataset)
    with pytest.raises(ValueError, match=r"1 of 1 annotations .* no mask \(first: id 7\).*data.masks=false"):
        loader_of(tmp_path, split, batch_size=1)
    loader = loader_of(tmp_path, split, batch_size=1, masks=False)
    assert not loader.has_masks
    assert all("masks" not in target for batch in loader for target in batch.targets)


def test_an_object_left_out_needs_no_mask(tmp_path: Path) -> None:
    flat = coco_object(2, 1, [4, 6, 0, 0], segmentation=[])
    write_split(tmp_path, "train", train_objects(coco_object(1, 1, [4, 6, 20, 10]), flat))
    assert len(loader_of(tmp_path, batch_size=1)) == 1


def test_missing_images_are_refused_beyond_the_limit(tmp_path: Path) -> None:
    write_root(tmp_path)
    (tmp_path / "train2017" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 images .*first: 2.png.*max_unreadable allows 0"):
        loader_of(tmp_path)
    assert len(list(loader_of(tmp_path, max_unreadable=1))) == 4


@pytest.mark.parametrize("damage", ["truncated", "other size"])
def test_a_damaged_image_is_replaced_and_named(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_root(tmp_path) / "train2017" / "2.png"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        picture(1, (32, 32)).save(path)
    loader = loader_of(tmp_path, max_unreadable=1)
    seen = [target["name"] for batch in loader for target in batch.targets]
    assert len(seen) == 8
    assert "2.png" not in seen
    assert "unreadable image 2.png" in caplog.text
    assert damage == "truncated" or "it is 32x32 when upright, its annotations are for 48x64" in caplog.text
    with pytest.raises(RuntimeError, match="1 images cannot be read"):
        list(loader_of(tmp_path))


def test_a_damaged_image_is_left_out_of_validation(tmp_path: Path) -> None:
    path = write_root(tmp_path) / "val2017" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    loader = loader_of(tmp_path, "validation", batch_size=1, max_unreadable=1)
    assert [target["image_id"] for batch in loader for target in batch.targets] == [1, 3]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_split(tmp_path, "train", two_objects_each([(64, 48)]))
    (tmp_path / "train2017").rename(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"no folder .*train2017.*data.train_images"):
        loader_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="no annotations at"):
        loader_of(tmp_path / "elsewhere")


def test_photographs_are_upright_rgb(tmp_path: Path) -> None:
    write_split(tmp_path, "train", two_objects_each([(48, 64)]))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(3, (64, 48)).convert("L").save(tmp_path / "train2017" / "1.png", exif=exif)
    (batch,) = loader_of(tmp_path, augment=PLAIN, batch_size=1)
    assert batch.images[0].shape == (3, 64, 48)


@pytest.mark.gpu
def test_batches_are_pinned_for_a_gpu(root: Path) -> None:
    batch = next(iter(loader_of(root)))
    assert all(tensor.is_pinned() for tensor in tensors_in(batch))


def test_unknown_splits_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="must be 'train' or 'validation', got 'test'"):
        loader_of(root, "test")
