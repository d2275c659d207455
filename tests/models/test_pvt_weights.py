"""Weights of PVT and PVTv2 as files: they come back, follow size and head, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from slabformer.models.weights.official import load_published, to_published
from slabformer.nn.resample import resample_table
from small_pvts import SMALL, V1, V2, images, small
from tolerances import EXACT, assert_close


@pytest.fixture(params=[V1, "pvt_tiny_prepbn", V2])
def release(request, tmp_path) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """A model's name, a published file of it for 224 px, and what is in there."""
    state = to_published(small(request.param, img_size=224).float())
    torch.save({"model": state}, tmp_path / "model.pth")
    return request.param, tmp_path / "model.pth", state


def pretrained(name: str, path: Path, **kwargs: Any) -> nn.Module:
    overlay = {"file": str(path), "custom_load": True}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs})


def test_a_file_comes_back_name_by_name(release):
    name, path, state = release
    back = to_published(pretrained(name, path, img_size=224))
    assert list(back) == list(state)
    for key, value in state.items():
        assert_close(back[key], value, EXACT)


def test_tables_of_a_file_follow_the_image_size(release):
    name, path, state = release
    model = pretrained(name, path, img_size=(64, 90))
    if name != V2:
        assert_close(model.stages[1].pos_embed, resample_table(state["pos_embed2"], (28, 28), (8, 12)), EXACT)
    if name != "pvt_tiny_prepbn":
        table = state["block1.0.attn.positional_encoding"]
        expected = resample_table(table, (56, 56), (16, 24))
        assert_close(model.stages[0].blocks[0].attn.positional_encoding, expected, EXACT)
    at_once = pretrained(name, path, img_size=224).eval()
    x = images(64, 90).float()
    assert_close(model.eval()(x), at_once(x), EXACT)


def test_grey_images_see_the_sum_of_the_colour_channels(release):
    name, path, state = release
    expected = state["patch_embed1.proj.weight"].sum(1, keepdim=True)
    assert_close(pretrained(name, path, in_chans=1).patch_embed.proj.weight, expected, EXACT)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_another_number_of_classes_asks_for_a_new_head(release, num_classes):
    name, path, state = release
    model = pretrained(name, path, num_classes=num_classes, img_size=224)
    assert model.num_classes == num_classes
    assert_close(model.stages[3].blocks[0].mlp.fc2.weight, state["block4.0.mlp.fc2.weight"], EXACT)


def test_features_come_pretrained(release):
    name, path, state = release
    backbone = pretrained(name, path, img_size=224, features_only=True)
    assert_close(backbone.model.stages[3].blocks[0].mlp.fc2.weight, state["block4.0.mlp.fc2.weight"], EXACT)


def test_a_file_of_another_plan_is_refused_in_one_line(release):
    name, path, _ = release
    other = "SSSS" if name != "pvt_tiny_prepbn" else "LLLL"
    model = small(name, attention=other, img_size=224)
    with pytest.raises(ValueError, match=f"checkpoint does not fit {name}: .* missing .*unexpected") as error:
        load_published(model, path)
    assert "\n" not in str(error.value)
