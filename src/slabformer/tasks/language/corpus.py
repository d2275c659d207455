"""Text as a sequence of documents: the embedded corpus, files, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from slabformer._extras import require
from slabformer._listing import check_regular, files_below, matches
from slabformer.settings import SHARE_OR_COUNT, NonEmptyStr, PositiveInt, Range, Settings
from slabformer.tasks.language.rows import Unit, kind_of, rows_of

EMBEDDED = "pydoc"
HUB = "hf:"


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Which text."""

    path: NonEmptyStr = EMBEDDED
    """`pydoc` for the documentation inside every Python installation; a file, a folder or a pattern of .txt, .jsonl or
    .parquet files (.gz, .zst ... too); `hf:NAME` for a data set of the Hugging Face hub."""
    subset: NonEmptyStr | None = None
    """Configuration of a data set of the hub."""
    split: NonEmptyStr = "train"
    """Split of a data set of the hub."""
    text_field: NonEmptyStr = "text"
    """Where the text lies in JSON lines and columns."""
    document: Unit = "file"
    """What one document is in text files: a `file`, a `paragraph` (up to an empty line) or a `line`."""
    validation: Annotated[float, SHARE_OR_COUNT, Range(gt=0)] = 0.1
    """Documents held out: a share, or a count from 1 on. A stream holds out its first ones and needs a count."""
    stream: bool = False
    """Read while training instead of once into memory."""
    shuffle_buffer: PositiveInt = 10_000
    """Of a stream: documents drawn from at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream and self.validation < 1:
            raise ValueError(
                f"a stream cannot hold out a share of its documents ({self.validation}); set data.validation to a count"
            )
        if self.stream and self.path == EMBEDDED:
            raise ValueError("the embedded corpus fits into memory; leave data.stream out")


class Corpus:
    """The documents of ``config.path``, in their order, again at every iteration; empty ones are left out.

    Iterating raises ``ValueError`` where a file cannot be read, or the text field is missing or is no text; it names
    the file and the row.

    Args:
        config: Which text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If files of several kinds are mixed or their kind is unknown.
        ImportError: If `datasets` is missing; names the extra.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._rows: Any = None if config.path == EMBEDDED else _open(config)

    def __iter__(self) -> Iterator[str]:
        texts = _embedded() if self._rows is None else self._texts(self._rows)
        return (text for text in texts if text.strip())

    def held_out(self) -> Iterator[str]:
        """The first documents of a stream."""
        return (text for text in self._texts(self._rows.take(int(self.config.validation))) if text.strip())

    def training(self, seed: int, epoch: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[str]:
        """The other documents of a stream, drawn from a buffer, in another order every epoch.

        Of several processes each reads the whole stream and keeps every ``world_size``-th document: their shares are
        the stream in turn, however many files it has, and tokenizing, which takes longest, is shared.
        """
        rows = self._rows.skip(int(self.config.validation))
        shuffled = rows.shuffle(seed=seed + epoch, buffer_size=self.config.shuffle_buffer)
        texts = (text for text in self._texts(shuffled) if text.strip())
        return islice(texts, rank, None, world_size)

    def _texts(self, rows: Any) -> Iterator[str]:
        field = self.config.text_field
        for row, where in self._read(rows):
            if not isinstance(row, dict):
                raise ValueError(f"{where} holds {_kind_of_value(row)}, not an object with a field {field!r}")
            if field not in row:
                raise ValueError(f"no field {field!r} in {where}, which has {', '.join(row)}; set data.text_field")
            if not isinstance(row[field], str):
                raise ValueError(
                    f"field {field!r} of {where} holds {_kind_of_value(row[field])}, not text; mend or remove it"
                )
            yield row[field]

    def _read(self, rows: Any) -> Iterator[tuple[Any, str]]:
        if not self.config.path.startswith(HUB):
            yield from ((found["row"], found["where"]) for found in rows)
            return
        try:
            for number, row in enumerate(rows, 1):
                yield row, f"{self.config.path}, row {number} of those read"
        except ValueError as error:  # a reader's own, which names no data set
            raise ValueError(f"{self.config.path} cannot be read: {error}") from error


def _kind_of_value(value: object) -> str:
    return "null" if value is None else type(value).__name__


def split_documents(config: DataConfig, documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to train on and held-out ones, which are picked by the hash of their text, whatever their order.

    Raises:
        ValueError: If there is no text, or too little to hold some out.
    """
    if not documents:
        raise ValueError(f"{config.path} holds no text")
    wanted = config.validation if config.validation >= 1 else max(1, round(config.validation * len(documents)))
    if wanted >= len(documents):
        raise ValueError(
            f"{config.path} holds {len(documents)} document(s), too few to hold out {wanted:g}; give more text, "
            "or split it finer with data.document: paragraph"
        )
    ranked = sorted(range(len(documents)), key=lambda index: sha256_of([documents[index]]))
    held_out = set(ranked[: int(wanted)])
    train = [text for index, text in enumerate(documents) if index not in held_out]
    return train, [documents[index] for index in sorted(held_out)]


def sha256_of(documents: Sequence[str]) -> str:
    """Of the documents in turn, lengths included, in hexadecimal."""
    digest = hashlib.sha256()
    for text in documents:
        data = text.encode()
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()


def _embedded() -> Iterator[str]:
    from pydoc_data.topics import topics

    return iter(topics[name] for name in sorted(topics))


def _open(config: DataConfig) -> Any:
    """Rows of ``config.path``, read as they are asked for; nothing is copied into a cache."""
    datasets = require("datasets", extra="lm")
    if config.path.startswith(HUB):
        return datasets.load_dataset(config.path.removeprefix(HUB), config.subset, split=config.split, streaming=True)
    files = _files(config.path)
    kinds = {_known_kind(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{config.path} mixes {' and '.join(sorted(kinds))} files; give a pattern for one of them")
    return datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"files": files, "unit": config.document})


def _files(path: str) -> list[str]:
    given = Path(path)
    if given.is_dir():
        found = files_below(given, lambda name: kind_of(name) is not None)
    else:
        found = [match for match in matches(path) if not Path(match).is_dir()]
    if not found:
        raise FileNotFoundError(
            f"no text at {path!r}; give .txt, .jsonl or .parquet files, a folder of them, hf:NAME, or {EMBEDDED}"
        )
    for file in found:
        check_regular(file)
    return found


def _known_kind(file: str) -> str:
    kind = kind_of(file)
    if kind is None:
        raise ValueError(f"cannot tell what {file} is; text (.txt), JSON lines (.jsonl) and .parquet can be read")
    return kind
