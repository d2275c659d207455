"""What is shown of a layer is what it computes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from slabformer import testing
from slabformer.figures.attention_maps import Hidden, Layer, padded_size, pick, record
from tolerances import FLOAT32, assert_close

SMALL = {"num_classes": 5, "img_size": 64, "depths": (1, 1, 1, 1)}
#: heads of one channel, which need no mean over channels
ONE_CHANNEL = {
    "slab_deit_micro": {"embed_dim": 8, "num_heads": 8, "img_size": (16, 24), "depth": 1},
    "slab_pvt_tiny": SMALL | {"embed_dims": (8, 8, 8, 8), "num_heads": (8, 8, 8, 8)},
    "slab_cswin_tiny": SMALL | {"embed_dim": 8, "num_heads": (8, 16, 32, 64)},
}


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = testing.randomize_norms_(timm.create_model(name, **kwargs)).eval()
    for path, module in model.named_modules():
        if path.endswith((".dwc", ".get_v")):
            nn.init.uniform_(module.weight, 0.1, 1)  # kernels above 0 need no absolute value
            nn.init.zeros_(module.bias)
    return model


def image(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def values_and_output(attention: nn.Module, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of all heads, and what the projection behind the attention is given, ``(N, C)``."""
    seen: dict[str, Tensor] = {}
    values = attention.qkv if hasattr(attention, "qkv") else attention.kv
    handles = [
        values.register_forward_hook(lambda _, __, out: seen.update(v=out)),
        attention.proj.register_forward_hook(lambda _, inputs, __: seen.update(out=inputs[0])),
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen["v"][0, :, -seen["out"].shape[-1] :], seen["out"][0]


@pytest.mark.parametrize(("name", "count"), [("slab_deit_micro", 1), ("slab_pvt_tiny", 4), ("slab_cswin_tiny", 5)])
def test_weights_times_values_are_what_the_layer_computes(name, count):
    model = create(name, **ONE_CHANNEL[name])
    x = image(*model.patch_embed.img_size) if name == "slab_deit_micro" else image()
    shown = [layer for layer in record(model, x) if isinstance(layer, Layer) and layer.kernels is not None]
    assert len(shown) == count
    for layer in shown:
        path, _, branch = layer.name.partition(".attns.")
        attention = model.get_submodule(path)
        shares = len(attention.attns) if branch else 1
        v, out = (t.chunk(shares, -1)[int(branch or 0)] for t in values_and_output(attention, model, x))
        assert_close(torch.einsum("hij,jh->ih", layer.weights(), v), out, FLOAT32)


def test_local_weights_are_means_of_absolute_values_over_a_heads_channels():
    model, x = create("slab_deit_micro"), image(32, 32)
    with torch.no_grad():
        model.blocks[0].attn.dwc.weight.normal_(generator=torch.Generator().manual_seed(1))
    layer = pick(record(model, x), "0")
    bare = layer.without_local().weights()
    kernel = model.blocks[0].attn.dwc.weight.detach()[:, 0]  # (D, 5, 5)
    expected = bare.clone()
    row, column = 3, 0
    for i in range(8):
        for j in range(8):
            if abs(i - row) <= 2 and abs(j - column) <= 2:
                taken = bare[:, row * 8 + column, i * 8 + j, None] + kernel[:, i - row + 2, j - column + 2]
                expected[:, row * 8 + column, i * 8 + j] = taken.abs().mean(-1)
    token = row * 8 + column
    assert_close(layer.weights()[:, token], expected[:, token], FLOAT32)
    assert_close(bare.sum(-1), torch.ones(2, 64), FLOAT32)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_micro"])
def test_softmax_layers_of_timm_show_their_softmax_without_the_class_token(name):
    size = {"img_size": 32, "depth": 2} | ({"patch_size": 8} if name.startswith("vit") else {})
    model, x = create(name, num_classes=5, **size), image(32, 32)
    seen = {}
    attention = model.blocks[1].attn
    layer = pick(record(model, x), "blocks.1")
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda _, inputs, __: seen.update(softmax=inputs[0][0]))
    with torch.no_grad():
        model(x)
    assert layer.query_grid == layer.key_grid == ((4, 4) if name.startswith("vit") else (8, 8))
    prefix = model.num_prefix_tokens
    assert_close(layer.weights(), seen["softmax"][:, prefix:, prefix:], FLOAT32)


def test_reduced_keys_lie_on_a_grid_of_their_own():
    model = create("pvt_tiny_prepbn", **SMALL)
    first, *_ = record(model, image(96, 64))
    assert (first.query_grid, first.key_grid) == ((24, 16), (3, 2))
    assert_close(first.weights().sum(-1), torch.ones(1, 24 * 16), FLOAT32)


def test_grids_cover_the_image_as_it_was_padded():
    model = create("slab_cswin_tiny", **SMALL)
    assert padded_size(model, image(50, 70)) == (64, 96)
    assert pick(record(model, image(50, 70)), "0").query_grid == (16, 24)


@pytest.mark.parametrize("name", ["swin_tiny_prepbn", "slab_cswin_tiny"])
def test_windows_cannot_be_shown_and_a_map_that_is_one_window_can(name):
    size = SMALL | {"img_size": 224, "depths": (1, 1, 2, 1)}
    layers = record(create(name, **size), image(224, 224))
    hidden = [layer for layer in layers if isinstance(layer, Hidden)]
    assert {layer.reason for layer in hidden} == {"it attends in windows"}
    assert layers[-1].name.startswith("stages.3")
    assert layers[-1].query_grid == (7, 7)
    with pytest.raises(
        ValueError, match=r"layer 'stages.2.blocks.1' cannot be shown: .*; these can .*: .*stages.3"
    ) as error:
        pick(layers, "stages.2.blocks.1")
    assert "\n" not in str(error.value)


def test_layers_are_picked_by_place_or_name():
    layers = record(create("slab_deit_micro"), image(32, 32))
    assert [pick(layers, wanted).name for wanted in ("0", "-1", "blocks.1", "blocks.2.attn")] == [
        "blocks.0.attn",
        "blocks.3.attn",
        "blocks.1.attn",
        "blocks.2.attn",
    ]
    for wanted in ("4", "blocks.11", "-5", "block"):
        with pytest.raises(ValueError, match=r"these can be shown: blocks\.0\.attn, blocks\.1\.attn"):
            pick(layers, wanted)


def test_nothing_of_the_recording_stays_behind():
    model, x = create("slab_deit_micro"), image(32, 32)
    record(model, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("attend" in vars(module) for module in model.modules())


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match=r"of one image \(1, in_chans, H, W\), got \(2, 3, 32, 32\)"):
        record(create("slab_deit_micro"), image(32, 32).expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="no attention to show in Conv2d"):
        record(nn.Conv2d(3, 3, 1), image())
