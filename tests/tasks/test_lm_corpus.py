"""Where text comes from, and how some of it is held out."""

from __future__ import annotations

import gzip
import json
import os
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
        ({"path": "broken.jsonl"}, r"broken\.jsonl, line 2 cannot be read: it is not JSON"),
        ({"validation": 0.0}, r"above 0, got 0\.0"),
        ({"validation": 2.5}, r"whole count from 1 on, got 2\.5"),
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


def test_files_are_found_whatever_their_case_and_signs(tmp_path: Path) -> None:
    folder = tmp_path / "lm[v2]"
    folder.mkdir()
    for name in ("a.txt", "B.TXT", "b [2020].txt", "c?.Md", "._a.txt", ".hidden.txt", "Thumbs.db"):
        (folder / name).write_text(name)
    (folder / "up").symlink_to(folder)
    assert sorted(documents(folder)) == ["B.TXT", "a.txt", "b [2020].txt", "c?.Md"]
    assert documents(folder / "b [2020].txt") == ["b [2020].txt"]
    assert documents(f"{folder}/*.txt") == ["a.txt", "b [2020].txt"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_byte_order_marks_are_no_text(encoding: str, unit: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9\r\n\r\nend".encode(encoding))
    expected = {"file": ["caf\u00e9\n\nend"], "paragraph": ["caf\u00e9", "end"], "line": ["caf\u00e9", "end"]}
    assert documents(tmp_path, document=unit) == expected[unit]
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": "caf\u00e9"}).encode(encoding))
    assert documents(tmp_path) == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": null}\n', r"field 'text' of .*a\.jsonl, line 3 holds null, not text"),
        ("a.jsonl", b'{"text": "a"}\nnull\n', r"a\.jsonl, line 2 holds null, not an object with a field 'text'"),
        ("a.json", b'[{"text": "a"},\n {"text": 7}]', r"field 'text' of .*a\.json, row 2 holds int"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl cannot be read: it is not JSON \(it is nested too deeply\)"),
        ("a.txt", b"x" * 3_000_000 + b"\xff", r"a\.txt is no text in UTF-8 \(invalid start byte at byte 3000000\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl is no text in UTF-8 \(.* at byte 24\)"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be expanded"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read after row 0"),
    ],
    ids=["null", "null-line", "number", "deep", "byte", "byte-in-json", "gzip", "parquet"],
)
def test_a_bad_row_is_named_with_its_file(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "0.txt" if name == "a.txt" else tmp_path / "0.md").write_text("good")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        documents(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_null_row_of_parquet_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"field 'text' of .*a\.parquet, row 3 holds null, not text"):
        documents(tmp_path / "a.parquet")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_named_pipe_is_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(OSError, match=r"a\.txt is a named pipe, not a regular file"):
        documents(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="no text at"):
        documents(tmp_path)
