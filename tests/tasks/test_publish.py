"""Folders as timm shares models: they load again, with timm where it can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from slabformer.tasks.publish import save_folder
from slabformer.tasks.saved_model import ModelInfo, load_model
from small_models import IMAGES, MODEL_ARGS, images, trained_looking
from tolerances import EXACT, FLOAT32, assert_close


def described(name: str = "slab_deit_micro") -> ModelInfo:
    return ModelInfo(
        model=name, model_args=dict(MODEL_ARGS), class_names=list("abcde"), input_size=IMAGES, mean=(0.1, 0.2, 0.3)
    )


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images())


def fused() -> nn.Module:
    return sf.fuse(trained_looking(), images())[0]


def converted() -> nn.Module:
    model = trained_looking("deit_micro")
    sf.convert_norms_(model, norm="repbn")
    return model.eval()


@pytest.mark.parametrize("name", ["slab_deit_micro", "deit_micro_prepbn", "deit_micro"])
def test_timm_loads_the_folder(name: str, tmp_path: Path) -> None:
    model = trained_looking(name)
    save_folder(model, tmp_path / "shared", described(name))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'shared'}", pretrained=True)
    assert_close(outputs(loaded), outputs(model), EXACT)
    config = loaded.pretrained_cfg
    assert (config["num_classes"], config["input_size"], tuple(config["mean"])) == (5, IMAGES, (0.1, 0.2, 0.3))
    assert config["label_names"] == list("abcde")


@pytest.mark.parametrize("make", [trained_looking, fused, converted], ids=["plain", "fused", "converted"])
def test_slabformer_loads_every_folder(make, tmp_path: Path) -> None:
    model, name = make(), "deit_micro" if make is converted else "slab_deit_micro"
    save_folder(model, tmp_path, described(name))
    for source in (tmp_path, f"local-dir:{tmp_path}"):
        loaded, info = load_model(source)
        assert_close(outputs(loaded), outputs(model), FLOAT32)
        assert info.class_names == list("abcde")


@pytest.mark.parametrize(("make", "name"), [(fused, "slab_deit_micro"), (converted, "deit_micro")])
def test_what_timm_cannot_rebuild_it_does_not_half_load(make, name: str, tmp_path: Path) -> None:
    save_folder(make(), tmp_path, described(name))
    for classes in ({}, {"num_classes": 3}):
        with pytest.raises(RuntimeError, match=r"Unknown model \(.* load it with slabformer\)"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **classes)
    card = (tmp_path / "README.md").read_text()
    assert "timm alone cannot rebuild that" in card
    assert "create_model" not in card


def test_another_number_of_classes_gets_a_new_head(tmp_path: Path) -> None:
    model = trained_looking()
    save_folder(model, tmp_path, described())
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert loaded.head.out_features == 3
    assert_close(loaded.blocks[0].norm1.rep.eta, model.blocks[0].norm1.rep.eta, EXACT)


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    figures = {"ImageNet-1K top-1": "74.3 %"}
    paths = save_folder(trained_looking(), tmp_path, described(), figures=figures, repo="me/digits", license="mit")
    assert [path.name for path in paths] == ["model.safetensors", "config.json", "README.md"]
    card = paths[2].read_text()
    for text in (
        "license: mit",
        "library_name: timm",
        "# Model card for digits",
        "PRepBN",
        "- **ImageNet-1K top-1:** 74.3 %",
        'timm.create_model("hf-hub:me/digits"',
        'load_model("hf-hub:me/digits")',
        "16x16 pixels",
    ):
        assert text in card
    assert json.loads(paths[1].read_text())["architecture"] == "slab_deit_micro"
