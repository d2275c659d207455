"""Places of shared models; the hub is a stand-in, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from slabformer.models.weights.hub import WEIGHTS, is_shared, upload, weights_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / WEIGHTS).write_bytes(b"weights")
    (tmp_path / "shared" / "README.md").write_text("# card")
    return tmp_path / "shared"


@pytest.mark.parametrize("spelling", ["{}", "local-dir:{}", "{}/model.safetensors"], ids=["folder", "timm's", "file"])
def test_a_folder_stands_for_the_file_in_it(spelling: str, folder: Path) -> None:
    assert weights_file(spelling.format(folder)) == folder / WEIGHTS


@pytest.mark.parametrize(("place", "revision"), [("me/m", None), ("me/m@v2", "v2")], ids=["newest", "revision"])
def test_a_repository_is_fetched(
    place: str, revision: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(*given: Any, **settings: Any) -> str:
        asked.append((*given, settings["revision"]))
        return str(folder / WEIGHTS)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert weights_file(f"hf-hub:{place}") == folder / WEIGHTS
    assert asked == [("me/m", WEIGHTS, revision)]


def test_without_a_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("many\nlines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ConnectionError, match=r"^cannot reach the hub for 'me/m', and its cache does not hold"):
        weights_file("hf-hub:me/m")


@pytest.mark.parametrize(
    ("source", "message"),
    [("local-dir:none", "no folder 'none' to load"), ("{}/empty", r"no model.safetensors in '.*empty'; give a file")],
    ids=["no-folder", "no-weights"],
)
def test_folders_without_a_model_are_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        weights_file(source.format(tmp_path))


class Api:
    """Notes what is uploaded."""

    def __init__(self, **_: Any) -> None: ...

    def create_repo(self, repo: str, **settings: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo}")

    def file_exists(self, **settings: Any) -> bool:
        return settings["repo_id"].endswith("old")

    def upload_folder(self, **settings: Any) -> None:
        uploads.append(settings)


uploads: list[dict[str, Any]] = []


@pytest.mark.parametrize(("repo", "kept"), [("new", None), ("old", ["README.md"])])
def test_a_card_that_is_there_stays(
    repo: str, kept: list[str] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert upload(folder, repo) == f"me/{repo}"
    assert uploads[-1]["repo_id"] == f"me/{repo}"
    assert uploads[-1]["ignore_patterns"] == kept


def test_a_hub_that_refuses_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token\nlog in first")

    monkeypatch.setattr(Api, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ConnectionError, match=r"the hub did not take or give 'me/m': no token$"):
        upload(folder, "me/m")


def test_places_are_told_from_names() -> None:
    assert is_shared("hf-hub:me/m")
    assert is_shared("local-dir:folder")
    assert not is_shared("slab_deit_tiny")
