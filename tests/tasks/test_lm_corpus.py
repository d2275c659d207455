"""Where text comes from, and how some of it is held out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from language_models import sentences
from slabformer.tasks.language.corpus import Corpus, DataConfig, sha256_of, split_documents

TEXTS = ["one\ntwo", "three", "", "four \u00e9"]
READ = [text for text in TEXTS if text]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": index}) + "\n" for index, text in enumerate(TEXTS)))


def write_gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2, 3, 4]}), path)


def documents(path: Path | str, **options: Any) -> list[str]:
    return list(Corpus(DataConfig(path=str(path), **options)))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.jsonl.gz", write_gzipped), ("a.parquet", write_parquet)],
    ids=["jsonl", "jsonl.gz", "parquet"],
)
def test_files_give_their_documents_again_and_again(name: str, write: Any, tmp_path: Path) -> None:
    write(tmp_path / name)
    corpus = Corpus(DataConfig(path=str(tmp_path / name)))
    assert list(corpus) == READ
    assert list(corpus) == READ


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("file", ["a b\nc\n\nd", "e"]), ("paragraph", ["a b\nc", "d", "e"]), ("line", ["a b", "c", "d", "e"])],
)
def test_a_folder_of_text_is_cut_as_asked(unit: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("a b\nc\n\nd")
    (tmp_path / "2.txt").write_text("e")
    (tmp_path / "picture.png").write_text("not text")
    assert documents(tmp_path, document=unit) == expected
    assert documents(tmp_path / "*.txt", document=unit) == expected


def test_the_embedded_corpus_is_there_offline() -> None:
    found = documents("pydoc")
    assert len(found) > 50
    assert sum(map(len, found)) > 300_000
    assert found == documents("pydoc")


def test_held_out_documents_do_not_depend_on_the_order() -> None:
    texts = [f"document {index}" for index in range(40)]
    config = DataConfig(validation=0.1)
    train, held_out = split_documents(config, texts)
    assert len(held_out) == 4
    assert sorted(train + held_out) == sorted(texts)
    assert set(split_documents(config, texts[::-1])[1]) == set(held_out)
    assert len(split_documents(DataConfig(validation=7), texts)[1]) == 7


def test_a_stream_holds_out_its_first_documents_and_reorders_the_rest(tmp_path: Path) -> None:
    texts = sentences(30)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    corpus = Corpus(DataConfig(path=str(tmp_path), document="line", validation=5, stream=True, shuffle_buffer=10))
    assert list(corpus.held_out()) == texts[:5]
    first, second = list(corpus.training(seed=0, epoch=0)), list(corpus.training(seed=0, epoch=1))
    assert sorted(first) == sorted(second) == sorted(texts[5:])
    assert first != second
    assert first == list(corpus.training(seed=0, epoch=0))


@pytest.mark.parametrize("files", [1, 4], ids=["one-file", "a-file-each"])
def test_processes_share_a_stream_without_what_is_held_out(files: int, tmp_path: Path) -> None:
    texts = sentences(41)
    for index in range(files):
        (tmp_path / f"{index}.txt").write_text("\n".join(texts[index::files]))
    corpus = Corpus(DataConfig(path=str(tmp_path), document="line", validation=5, stream=True, shuffle_buffer=10))
    alone = list(corpus.training(seed=0, epoch=2))
    shares = [list(corpus.training(0, 2, rank, 4)) for rank in range(4)]
    assert [len(share) for share in shares] == [9, 9, 9, 9]
    assert [text for row in zip(*shares, strict=True) for text in row] == alone
    assert sorted(alone + list(corpus.held_out())) == sorted(texts)


def test_the_digest_sees_where_documents_end() -> None:
    assert sha256_of(["ab", "c"]) != sha256_of(["a", "bc"])
    assert sha256_of(["ab", "c"]) == sha256_of(["ab", "c"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "nowhere/at/all"}, r"no text at 'nowhere/at/all'; give \.txt, \.jsonl or \.parquet"),
        ({"path": "a.csv"}, r"cannot tell what .*a\.csv is"),
        ({"path": "mixed"}, r"mixes json and text files"),
        ({"path": "mixed/a.jsonl", "text_field": "body"}, r"no field 'body' in .*, which has text, id"),
        ({"path": "mixed/a.jsonl", "text_field": "id"}, r"holds int, not text"),
        ({"path": "broken.jsonl"}, r"broken\.jsonl cannot be read: JSON parse error"),
        ({"validation": 0.0}, r"above 0, got 0\.0"),
        ({"validation": 2.5}, r"whole number from 1 on, got 2\.5"),
        ({"path": "mixed", "stream": True}, r"cannot hold out a share of its documents \(0\.1\)"),
        ({"validation": 3, "stream": True}, r"embedded corpus fits into memory"),
    ],
    ids=["no-file", "kind", "mixed", "field", "not-text", "broken", "zero", "part", "stream-share", "stream-embedded"],
)
def test_mistakes_are_told(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mixed").mkdir()
    write_jsonl(Path("mixed/a.jsonl"))
    Path("mixed/b.txt").write_text("text")
    Path("a.csv").write_text("text")
    Path("broken.jsonl").write_text('{"text": "whole"}\n{"text": "cut off')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(Corpus(DataConfig(**given)))


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "holds no text"), (["one"], r"holds 1 document\(s\), too few to hold out 1; give more text")],
    ids=["empty", "single"],
)
def test_too_little_text_is_told(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_documents(DataConfig(), texts)
