"""Which folders hold the splits and the classes of a data set of images."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Literal

from slabformer._listing import folders_in, is_hidden
from slabformer.tasks.images import is_image_name

Split = Literal["train", "validation"]
#: words that name a split; of several validation splits the first in this order is taken
SPLIT_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing"),
}
#: words beside them that say nothing: training_set, val2017, Test_Images
_FILLERS = frozenset({"set", "data", "dataset", "split", "image", "images", "img", "imgs", "folder", "files"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def split_word(name: str) -> str | None:
    """The word of :data:`SPLIT_WORDS` that a file or folder called ``name`` is called by, if it is called by one."""
    words = [word.lower() for word in _WORD.findall(name)]
    known = {word for each in SPLIT_WORDS.values() for word in each}
    words = [word.removesuffix("set") if word.removesuffix("set") in known else word for word in words]
    words = [word for word in words if word not in _FILLERS]
    return words[0] if len(words) == 1 and words[0] in known else None


def split_folder(root: Path, split: Split, name: str | None) -> Path | None:
    """The sub-folder of ``root`` that holds ``split``: ``name``, or the one that is called by it.

    A folder called by a split holds folders of classes: beside other classes, one that holds images is a class.

    Raises:
        ValueError: If several are called alike, or one holds images and no classes.
    """
    if name is not None:
        return root / name if (root / name).is_dir() else None
    folders = folders_in(root)
    called = {word: [f for f in folders if split_word(f.name) == word] for word in SPLIT_WORDS[split]}
    found = next((folders for folders in called.values() if folders), [])
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"{root} has several folders for {split}: {names}; name one by data.{split}_split")
    if not found or folders_in(found[0]):
        return found[0] if found else None
    if all(split_word(folder.name) for folder in folders):
        raise ValueError(f"{found[0]} holds no folders of classes; it needs one sub-folder of images a class")
    return None


def class_folders(folder: Path) -> list[str]:
    """Names of the classes: the sub-folders of ``folder``, sorted.

    Raises:
        ValueError: If there are none, or two look alike and differ in their Unicode normal form alone.
    """
    classes = [place.name for place in folders_in(folder)]
    if not classes:
        raise ValueError(f"{folder} holds no classes; it needs one sub-folder of images a class")
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise ValueError(
                f"{folder} holds one class under two spellings that look alike, {other!a} and {name!a}; merge them"
            )
    return classes


def check_classes(folder: Path, classes: list[str]) -> None:
    """Refuse what can hardly be meant as the classes to tell apart.

    Raises:
        ValueError: If there is a single one, or they are folders of the same classes, as splits are.
    """
    inside = [{place.name for place in folders_in(folder / name)} for name in classes]
    if len(classes) == 1:
        hint = f"; is {folder / classes[0]} what you mean?" if len(inside[0]) > 1 else ""
        raise ValueError(
            f"{folder} holds a single class, {classes[0]!r}, which leaves nothing to tell apart; "
            f"it needs one sub-folder of images a class{hint}"
        )
    if inside[0] and all(names == inside[0] for names in inside):
        raise ValueError(
            f"{', '.join(classes[:3])} in {folder} hold the same sub-folders ({', '.join(sorted(inside[0])[:3])}) "
            "and look like splits; name them by data.train_split and data.validation_split"
        )


def images_outside_classes(folder: Path) -> int:
    """How many images lie in ``folder`` itself, beside the classes."""
    return sum(is_image_name(f.name) and not is_hidden(f.name) and f.is_file() for f in folder.iterdir())
