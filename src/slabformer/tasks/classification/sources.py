"""Where images come from: a folder, a timm data set name, tar shards, or the embedded digits."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from slabformer._extras import require
from slabformer._listing import files_below, folders_in
from slabformer.tasks.classification.config import DataConfig
from slabformer.tasks.classification.digits import DigitsSource
from slabformer.tasks.classification.folders import (
    SPLIT_WORDS,
    Split,
    check_classes,
    class_folders,
    images_outside_classes,
    split_folder,
    split_word,
)
from slabformer.tasks.classification.shards import ShardSource
from slabformer.tasks.classification.split import held_out
from slabformer.tasks.images import is_image_name, read_image, to_rgb

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Images by index, in an order that never changes."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image ``index`` as RGB and its class; raises one of ``images.UNREADABLE``."""
        ...

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message."""
        ...


def open_source(data: DataConfig, split: Split) -> Source:
    """The images of ``split``.

    Raises:
        ValueError: If a split, a class or the whole data set is not there; says what to do.
        FileNotFoundError: If the folder does not exist.
        ImportError: If the library behind a data set name is missing.
    """
    kind = data.path.split("/")[0].lower() if "/" in data.path and not Path(data.path).exists() else ""
    name = data.train_split if split == "train" else data.validation_split
    if data.path == "digits":
        return _labelled_or_not(data, DigitsSource(split))
    if kind in ("hfds", "torch"):
        return _labelled_or_not(data, TimmSource(data, name or split))
    if kind == "wds":
        return _labelled_or_not(data, ShardSource(Path(data.root or data.path.split("/", 1)[1]), split, name))
    if kind in ("hfids", "tfds"):
        raise ValueError(
            f"{data.path!r} is a stream without a fixed order, so no run on it can resume; use hfds/ or wds/"
        )
    return _open_folder(data, split, name) if data.labels else _open_images(data, split, name)


def _labelled_or_not(data: DataConfig, source: Source) -> Source:
    return source if data.labels else WithoutLabels(source)


class WithoutLabels:
    """The images of another source, all of one class that has no name."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.class_names: list[str] = []

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        return self._source.read(index)[0], 0

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return self._source.name(index)


class FolderSource:
    """Image files with one class each."""

    def __init__(self, files: Sequence[tuple[str, int]], class_names: list[str]) -> None:
        self.files, self.class_names = files, class_names

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        path, label = self.files[index]
        return read_image(path), label

    def name(self, index: int) -> str:
        """The file's path."""
        return self.files[index][0]


class TimmSource:
    """A data set with random access that timm knows by name, ``hfds/NAME`` or ``torch/NAME``."""

    def __init__(self, data: DataConfig, split: str) -> None:
        if data.path.lower().startswith("hfds/"):
            _require_datasets(data.path)
        timm_data = require("timm.data", extra="vision")
        arguments: dict[str, Any] = {"name": data.path, "root": data.root, "split": split, "download": data.download}
        if data.path.lower().startswith("torch/"):
            arguments["root"] = data.root or str(Path("~/.cache/slabformer/data").expanduser())
        try:
            self.dataset = timm_data.create_dataset(**arguments)
        except AssertionError as error:  # timm's word for a name it does not know
            raise ValueError(f"unknown data set {data.path!r}; timm says: {error}") from error
        except RuntimeError as error:
            hint = "pass data.download=true, or data.root with its folder"
            raise ValueError(f"cannot open {data.path!r} in {arguments['root']!r} ({error}); {hint}") from error
        self.path, self.reader = data.path, getattr(self.dataset, "reader", None)
        self.class_names = self._class_names()

    def _class_names(self) -> list[str]:
        if self.reader is None:
            names = getattr(self.dataset, "classes", None)
            labels = getattr(self.dataset, "targets", None)
        else:
            names = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get)
            labels = None if names else self.reader.dataset[self.reader.label_key]
        if names:
            return [name if isinstance(name, str) else name[0] for name in names]
        if labels is None:
            raise ValueError(f"{self.path!r} does not name its classes; use a folder with one sub-folder a class")
        return [str(label) for label in range(int(np.max(labels)) + 1)]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        if self.reader is None:
            image, label = self.dataset[index]
            return to_rgb(image), int(label)
        file, label = self.reader[index][:2]
        with file:
            return read_image(file), int(label)

    def name(self, index: int) -> str:
        """The file's path where there is one."""
        return f"{self.path}[{index}]"


def _require_datasets(path: str) -> None:
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"{path!r} needs Hugging Face's datasets; pip install datasets") from error


def _open_folder(data: DataConfig, split: Split, name: str | None) -> FolderSource:
    root = Path(data.path)
    if not root.is_dir():
        known = "a folder, hfds/NAME, torch/NAME, wds/FOLDER or digits"
        raise FileNotFoundError(f"no data at {data.path!r}: no such folder; data.path is {known}")
    folder, train = split_folder(root, split, name), split_folder(root, "train", data.train_split)
    if folder is None and train is None and not name:
        return _divide(data, root, split)
    if folder is None:
        expected = name or ", ".join(SPLIT_WORDS[split])
        raise ValueError(f"{data.path!r} has no {split} images; looked for a sub-folder named {expected}")
    classes = class_folders(train or folder)
    check_classes(train or folder, classes)
    unknown = sorted(set(class_folders(folder)) - set(classes))
    if unknown:
        alike = {unicodedata.normalize("NFC", name) for name in classes}
        # an accented letter may be one character or two
        shown = ascii if unicodedata.normalize("NFC", unknown[0]) in alike else repr
        raise ValueError(
            f"{folder} has class {shown(unknown[0])}, which {train} has not; both need the same sub-folders"
        )
    present = classes if folder == train else [name for name in classes if (folder / name).is_dir()]
    if len(present) < len(classes):
        logger.warning("%s holds images of %d of %d classes", folder, len(present), len(classes))
    return FolderSource(_list_images(folder, present, classes), classes)


def holds_images_alone(data: DataConfig) -> bool:
    """Whether ``data.path`` is a folder with images and no folders, so that there are no classes."""
    root = Path(data.path)
    return root.is_dir() and not folders_in(root) and images_outside_classes(root) > 0


def _open_images(data: DataConfig, split: Split, name: str | None) -> FolderSource:
    """All images below a folder, or below its sub-folder for ``split``."""
    root = Path(data.path)
    if not root.is_dir():
        raise FileNotFoundError(f"no data at {data.path!r}: no such folder")
    called = [folder for folder in folders_in(root) if split_word(folder.name) in SPLIT_WORDS[split]]
    folder = root / name if name is not None else called[0] if len(called) == 1 else root
    files = [(path, 0) for path in files_below(folder, is_image_name)] if folder.is_dir() else []
    if not files:
        raise ValueError(f"no images in {folder} (such as .jpg or .png)")
    return FolderSource(files, []) if folder != root else _share(data, root, split, files, [])


def _divide(data: DataConfig, root: Path, split: Split) -> FolderSource:
    """Split a folder of classes by ``validation_fraction``."""
    classes = class_folders(root)
    check_classes(root, classes)
    return _share(data, root, split, _list_images(root, classes, classes), classes)


def _share(
    data: DataConfig, root: Path, split: Split, files: list[tuple[str, int]], classes: list[str]
) -> FolderSource:
    """Those of ``files`` that ``validation_fraction`` gives to ``split``."""
    chosen = held_out([label for _, label in files], data.validation_fraction, data.split_seed)
    chosen = chosen if split == "validation" else ~chosen
    if not chosen.any():
        raise ValueError(f"validation_fraction {data.validation_fraction} leaves no {split} images in {data.path!r}")
    logger.info("%s has no splits: %d of its %d images are for %s", root, chosen.sum(), len(files), split)
    return FolderSource([file for file, keep in zip(files, chosen, strict=True) if keep], classes)


def _list_images(folder: Path, present: list[str], classes: list[str]) -> list[tuple[str, int]]:
    """Images of the classes ``present``, numbered as in ``classes``, by class and name."""
    numbers = {name: number for number, name in enumerate(classes)}
    if outside := images_outside_classes(folder):
        logger.warning("%s holds %d images beside its folders of classes: left out", folder, outside)
    files = []
    for name in present:
        found = files_below(folder / name, is_image_name)
        if not found:
            raise ValueError(
                f"class {name!r} is empty: no images in {folder / name} (such as .jpg or .png); add some or remove it"
            )
        files += [(path, numbers[name]) for path in found]
    return files
