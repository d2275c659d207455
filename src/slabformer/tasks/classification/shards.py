"""WebDataset shards (tar files of ``KEY.jpg`` and ``KEY.cls``), read at random so that order never hangs on workers."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from slabformer._files import read_text
from slabformer._listing import is_hidden, matches
from slabformer.tasks.classification.folders import SPLIT_WORDS, Split
from slabformer.tasks.engine.documents import read_json
from slabformer.tasks.images import image_suffixes, read_image
from slabformer.tasks.paths import path_inside

_ALL_WORDS = {word for words in SPLIT_WORDS.values() for word in words}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Member:
    """Where one image lies, and its class."""

    shard: Path
    key: str
    offset: int
    size: int
    label: int


class ShardSource:
    """Images in uncompressed tar shards, indexed once by their headers and then read by offset.

    Args:
        folder: Where the shards lie; ``classnames.txt`` there names the classes, one a line.
        split: "train" or "validation", looked for in the shards' names.
        pattern: The split's shards instead: a split of ``_info.json``, a glob, or ``name-{0000..0127}.tar``.

    Raises:
        ValueError: If there is no such folder, no shard of that split, or a shard is no tar file or has no labels.
    """

    def __init__(self, folder: Path, split: Split, pattern: str | None = None) -> None:
        if not folder.is_dir():
            raise ValueError(f"no shards at {str(folder)!r}: no such folder; give wds/FOLDER, or data.root")
        shards = _find_shards(folder, split, pattern)
        self.members = [member for shard in shards for member in _index(shard)]
        if not self.members:
            raise ValueError(f"the {len(shards)} {split} shards in {folder} hold no images")
        self.class_names = self._class_names(folder)

    def _class_names(self, folder: Path) -> list[str]:
        count = max(member.label for member in self.members) + 1
        file = folder / "classnames.txt"
        names = read_text(file).splitlines() if file.is_file() else [str(label) for label in range(count)]
        if len(names) < count:
            raise ValueError(f"{file} names {len(names)} classes, labels in the shards reach {count - 1}")
        return names

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image ``index`` as RGB and its class."""
        member = self.members[index]
        with member.shard.open("rb") as file:
            file.seek(member.offset)
            content = file.read(member.size)
        return read_image(io.BytesIO(content)), member.label

    def name(self, index: int) -> str:
        """The shard and the key inside."""
        member = self.members[index]
        return f"{member.shard}:{member.key}"


def _find_shards(folder: Path, split: Split, pattern: str | None) -> list[Path]:
    listed = _listed(folder, pattern or split)
    if listed is not None:
        shards = [path_inside(folder, name) for name in listed]
    elif pattern is not None:
        shards = [Path(path) for part in _expand(pattern) for path in matches(str(folder / part))]
    else:
        tars = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar" and not is_hidden(path.name))
        called = ([path for path in tars if _words(path) & _ALL_WORDS == {word}] for word in SPLIT_WORDS[split])
        shards = next(filter(None, called), [])
    missing = [shard for shard in shards if not shard.is_file()]
    if not shards or missing:
        what = f"{missing[0].name} is listed but missing" if missing else f"no shard for {pattern or split!r}"
        raise ValueError(f"{what} in {folder}; name them by data.{split}_split, e.g. '{split}-{{000..127}}.tar'")
    return shards


def _words(shard: Path) -> set[str]:
    return set(re.findall("[a-z]+", shard.stem.lower()))


def _listed(folder: Path, split: str) -> list[str] | None:
    """The shards of ``split`` according to the folder's info file, None without one."""
    for name in ("_info.json", "info.json"):
        if (folder / name).is_file():
            listed: Any = read_json(folder / name)
            for key in ("splits", split, "filenames"):
                listed = listed.get(key, {}) if isinstance(listed, dict) else {}
            if listed and not isinstance(listed, list):
                raise ValueError(f"splits.{split}.filenames in {folder / name} must be a list of names, got {listed!r}")
            return listed or None
    return None


def _expand(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` as three names; anything else as it is."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{pattern[: found.start()]}{n:0{len(first)}d}{pattern[found.end() :]}" for n in numbers]


def _index(shard: Path) -> list[Member]:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                folder, slash, file = entry.name.rpartition("/")
                if is_hidden(file) or not entry.isfile():
                    continue
                stem, _, suffix = file.partition(".")
                key = f"{folder}{slash}{stem}"
                if f".{suffix.lower()}" in image_suffixes():
                    images[key] = (entry.offset_data, entry.size)
                elif suffix.lower() == "cls" and (content := tar.extractfile(entry)) is not None:
                    labels[key] = int(content.read())
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{shard} is not an uncompressed tar of images and .cls labels ({error})") from error
    unlabelled = images.keys() - labels.keys()
    if unlabelled:
        raise ValueError(f"{shard} has {len(unlabelled)} images without a .cls label (first: {min(unlabelled)})")
    return [Member(shard, key, *place, labels[key]) for key, place in images.items()]
