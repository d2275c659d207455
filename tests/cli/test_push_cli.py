"""`slab push`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm

from slabformer.cli.main import main
from small_models import saved


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(saved(tmp_path / "model.safetensors"))


def test_a_folder_is_written_that_every_verb_and_timm_read(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shared"
    assert main(["push", model, "--folder", str(folder)]) == 0
    assert str(folder / "config.json") in capsys.readouterr().out
    assert main(["verify", model, str(folder)]) == 0
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 5
    assert "Multiply-adds:** 0.00" in (folder / "README.md").read_text()


def test_figures_of_an_evaluation_stand_on_the_card(model: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"deployed": {"top1": 0.75, "images": 1200}}))
    assert main(["push", model, "--folder", str(tmp_path / "shared"), "--eval", str(result)]) == 0
    assert "Accuracy, deployed:** top-1 75.00% of 1,200 images" in (tmp_path / "shared" / "README.md").read_text()


def test_a_repository_gets_the_folder(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = {}

    def upload(folder: Path, repo: str, **settings: object) -> str:
        pushed.update(settings, files={path.name for path in folder.iterdir()})
        return repo

    monkeypatch.setattr("slabformer.models.weights.hub.upload", upload)
    assert main(["push", model, "--repo", "me/digits", "--private"]) == 0
    assert pushed["files"] == {"model.safetensors", "config.json", "README.md"}
    assert pushed["private"] is True
    assert "https://huggingface.co/me/digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "nowhere to push to; give --output FOLDER"),
        (["slab_deit_micro", "--folder", "x"], "names a model without weights"),
        (["MODEL", "--folder", "FOLDER", "--eval", "MODEL"], "is not what `slab eval --json` writes"),
    ],
    ids=["nowhere", "no-weights", "no-figures"],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": model, "FOLDER": str(tmp_path / "shared")}
    assert main(["push", *(places.get(argument, argument) for argument in arguments)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
