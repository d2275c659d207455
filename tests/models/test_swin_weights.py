"""Swin's weights as files: they come back, follow size and window, or are refused."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from slabformer.models.weights.official import load_published, to_published
from slabformer.nn.controls import prepbn_modules
from slabformer.nn.resample import resample_table
from slabformer.nn.shifted_windows import resample_bias_table
from small_swins import SMALL, create, images
from tolerances import EXACT, FLOAT32, assert_close


class TestPretrained:
    @pytest.fixture
    def source(self) -> nn.Module:
        model = create(window_size=7).float()
        for norm in prepbn_modules(model).values():
            norm.set_gamma(0.0)
        return model

    @pytest.fixture
    def load(self, source, tmp_path):
        torch.save({"model": to_published(source)}, tmp_path / "published.pth")
        overlay = {"file": str(tmp_path / "published.pth")}  # known by its suffix
        shape = {**SMALL, "window_size": 7, "num_classes": 10}
        return lambda **kwargs: timm.create_model(
            "slab_swin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **{**shape, **kwargs}
        ).eval()

    def test_every_tensor_comes_back(self, source, load):
        x = images(50, 60).float()
        assert_close(load()(x), source(x), EXACT)

    def test_another_head_and_stem_are_fitted(self, source, load):
        model = load(num_classes=7, in_chans=1)
        assert model(images()[:, :1].float()).shape == (2, 7)
        assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True), EXACT)
        assert_close(model.stages[3].blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight, EXACT)

    def test_tables_follow_another_image_size(self, source, load):
        model, x = load(img_size=(96, 64)), images(96, 64).float()
        table = resample_table(source.stages[0].blocks[0].attn.positional_encoding, (16, 16), (24, 16))
        assert_close(model.stages[0].blocks[0].attn.positional_encoding, table, EXACT)
        assert_close(model(x), source(x), FLOAT32)

    def test_bias_tables_follow_another_window(self, source, load):
        model = load(window_size=4)
        table = source.stages[2].blocks[0].attn.relative_position_bias_table
        expected = resample_bias_table(table, (7, 7), (4, 4))
        assert_close(model.stages[2].blocks[0].attn.relative_position_bias_table, expected, EXACT)


def test_index_and_masks_are_put_back_as_published():
    """At the published size; order, shapes and dtypes are held elsewhere."""
    model = timm.create_model("slab_swin_tiny", embed_dim=8, num_heads=(1, 1, 2, 2))
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    state = to_published(model)
    reference = SwinTransformer(embed_dim=8, num_heads=(1, 1, 2, 2))
    masks = [name for name in state if name.endswith("attn_mask")]
    assert masks == [f"layers.2.blocks.{i}.attn_mask" for i in (1, 3, 5)]
    for name in masks:
        assert_close(state[name], reference.get_buffer(name), EXACT)
    indices = [name for name in state if name.endswith("relative_position_index")]
    assert len(indices) == 8
    for name in indices:
        assert_close(state[name], reference.get_buffer(name), EXACT)


def test_buffers_of_a_file_are_never_read():
    model = create().float()
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    state, x = to_published(model), images().float()
    for name, value in state.items():
        if name.endswith(("attn_mask", "relative_position_index")):
            state[name] = value + 1
    expected = model(x)
    load_published(model, state)
    assert_close(model(x), expected, EXACT)


def test_a_file_of_another_plan_is_refused():
    source = create("SSSS", norm="repbn")
    with pytest.raises(ValueError, match=r"checkpoint does not fit slab_swin_tiny: .*missing .*unexpected") as error:
        load_published(create("LLSS"), to_published(source))
    assert "\n" not in str(error.value)
