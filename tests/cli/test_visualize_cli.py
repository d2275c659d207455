from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from fusing import ready
from image_folders import picture
from slabformer.cli.main import main
from slabformer.models.weights.official import to_published
from small_models import saved


@pytest.fixture
def photo(tmp_path: Path) -> str:
    picture(0).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_a_row_for_each_layer_and_head_and_a_column_for_each_model(tmp_path, photo):
    models = [str(saved(tmp_path / f"{name}.safetensors", name)) for name in ("deit_micro", "slab_deit_micro")]
    output = tmp_path / "attention.svg"
    options = ["--layers", "0", "blocks.3", "--heads", "0", "1", "--image", photo, "--output", str(output)]
    assert main(["visualize", *models, *options]) == 0
    text = output.read_text()
    for layer in ("blocks.0.attn", "blocks.3.attn"):
        assert text.count(f"{layer}<") == 2 * 2
    assert text.count("head 1, brightest") == 2 * 2
    assert text.count("16 x 16 tokens") == 4 * 2
    assert [text.count(f"{name} ({name})") for name in ("deit_micro", "slab_deit_micro")] == [1, 1]


def test_a_linear_model_is_shown_without_its_convolution_if_asked(tmp_path, photo):
    models = [str(saved(tmp_path / f"{name}.safetensors", name)) for name in ("deit_micro", "slab_deit_micro")]
    output = tmp_path / "attention.svg"
    assert main(["visualize", *models, "--without-local", "--image", photo, "--output", str(output)]) == 0
    assert output.read_text().count("without DWC") == 1


def test_the_default_image_and_published_weights(tmp_path, caplog):
    model = ready(timm.create_model("slab_deit_micro"), torch.float32)
    torch.save({"model": to_published(model)}, tmp_path / "released.pth")
    output = tmp_path / "attention.png"
    assert main(["visualize", f"slab_deit_micro={tmp_path / 'released.pth'}", "--output", str(output)]) == 0
    with Image.open(output) as drawn:
        assert drawn.width > 600
    assert "random weights" not in caplog.text


def test_random_weights_are_called_that(tmp_path, photo, caplog):
    output = tmp_path / "attention.svg"
    assert main(["visualize", "slab_deit_micro", "--image", photo, "--output", str(output)]) == 0
    assert "slab_deit_micro has random weights" in caplog.text
    assert "slab_deit_micro (random weights)" in output.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "blocks.9"], "there is no attention 'blocks.9'; these can be shown: blocks.0.attn"),
        (["--layers", "7"], "there is no layer 7 among 4; these can be shown: blocks.0.attn"),
        (["--heads", "2"], "blocks.0.attn of slab_deit_micro (random weights) has heads 0 to 1, got 2"),
        (["--at", "0.5", "1.0"], "the point lies outside the image"),
        (["--image", "nowhere.png"], "--image must be a file that exists, got 'nowhere.png'"),
        (["--image", __file__], f"cannot read {__file__} as an image"),
        (["--output", "nowhere/attention.png"], "no folder 'nowhere' to write attention.png into"),
        (["--output", "attention.doc"], "--output must be a .png, .svg or .pdf file, got 'attention.doc'"),
    ],
    ids=["name", "place", "head", "point", "missing", "unreadable", "folder", "format"],
)
def test_what_cannot_be_shown_costs_one_line(options, message, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["visualize", "slab_deit_micro", "--image", photo, *options]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert message in complaint
    assert list(tmp_path.glob("attention*")) == []
