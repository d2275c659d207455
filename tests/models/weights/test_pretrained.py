from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm
import torch

from reference_files import published_state
from slabformer.models.weights import published
from slabformer.models.weights.pretrained import fetch
from slabformer.nn.resample import resample_table
from tolerances import EXACT, assert_close


@pytest.fixture
def release(tmp_path, monkeypatch) -> Path:
    """A folder that stands in for the release page, with the file of slab_deit_tiny."""
    folder = tmp_path / "release"
    folder.mkdir()
    torch.save({"model": published_state("slab_deit_t")}, folder / "slab_deit_tiny.pth")
    monkeypatch.setattr(published, "RELEASE", folder.as_uri())
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def create(cache: Path, **kwargs):
    return timm.create_model("slab_deit_tiny", pretrained=True, cache_dir=cache, **kwargs)


def test_the_first_download_is_remembered_by_checksum(release, cache):
    path = fetch("slab_deit_tiny", cache)
    digest = hashlib.sha256((release / "slab_deit_tiny.pth").read_bytes()).hexdigest()
    assert (cache / "slab_deit_tiny.pth.sha256").read_text() == f"{digest}  slab_deit_tiny.pth\n"
    (release / "slab_deit_tiny.pth").unlink()
    assert fetch("slab_deit_tiny", cache) == path


def test_a_cached_file_that_changed_is_refused(release, cache):
    path = fetch("slab_deit_tiny", cache)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="has changed since it was downloaded; delete it"):
        fetch("slab_deit_tiny", cache)


def test_without_a_network_one_line_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(published, "RELEASE", "file:///nowhere")
    with pytest.raises(
        ConnectionError, match=r"cannot download file:///nowhere/slab_deit_tiny.pth .* save it as"
    ) as error:
        create(cache)
    assert "\n" not in str(error.value)
    assert not (cache / "slab_deit_tiny.pth").exists()


@pytest.mark.parametrize("name", ["slab_deit_micro", "slab_pvt_small"])
def test_models_without_released_weights_say_so(name, cache):
    with pytest.raises(ValueError, match=f"no weights were released for {name}; there are some for deit_tiny_prepbn"):
        fetch(name, cache)


def test_pretrained_loads_every_tensor(release, cache):
    model, state = create(cache), published_state("slab_deit_t")
    assert_close(model.head.weight, state["head.weight"], EXACT)
    assert_close(model.blocks[3].norm1.rep.eta, state["blocks.3.norm1.norm2.alpha"], EXACT)
    assert model.norm.phase == "done"


def test_a_damaged_release_is_an_error_and_no_random_model(release, cache):
    torch.save({"model": published_state("deit_t_prepbn")}, release / "slab_deit_tiny.pth")
    with pytest.raises(ValueError, match="checkpoint does not fit slab_deit_tiny"):
        create(cache)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_another_number_of_classes_asks_for_a_new_head(release, cache, num_classes):
    model = create(cache, num_classes=num_classes)
    assert model.num_classes == num_classes
    assert_close(model.pos_embed, published_state("slab_deit_t")["pos_embed"], EXACT)


def test_a_file_with_other_classes_is_refused_unless_they_were_asked_for(release, cache):
    state = published_state("slab_deit_t")
    state["head.weight"], state["head.bias"] = state["head.weight"][:10], state["head.bias"][:10]
    torch.save({"model": state}, release / "slab_deit_tiny.pth")
    with pytest.raises(ValueError, match="the file has 10 classes, the model 1000; pass num_classes=10 to load"):
        create(cache)
    assert_close(create(cache, num_classes=10).head.weight, state["head.weight"], EXACT)
    assert create(cache, num_classes=4).head.weight.shape == (4, 192)


def test_features_come_pretrained(release, cache):
    backbone = create(cache, features_only=True)
    assert_close(backbone.model.pos_embed, published_state("slab_deit_t")["pos_embed"], EXACT)


def test_grey_images_see_the_sum_of_the_colour_channels(release, cache):
    weight = published_state("slab_deit_t")["patch_embed.proj.weight"]
    assert_close(create(cache, in_chans=1).patch_embed.proj.weight, weight.sum(1, keepdim=True), EXACT)


def test_tables_follow_another_image_size(release, cache):
    model, state = create(cache, img_size=(128, 256)), published_state("slab_deit_t")
    table = resample_table(state["blocks.0.attn.positional_encoding"], (14, 14), (8, 16))
    assert_close(model.blocks[0].attn.positional_encoding, table, EXACT)
    assert model.pos_embed.shape == (1, 128, 192)


def test_a_source_of_the_callers_own_is_left_to_timm(release, cache, tmp_path):
    model = timm.create_model("slab_deit_tiny")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    own = create(cache, pretrained_cfg_overlay={"file": str(tmp_path / "own.pth"), "custom_load": False})
    assert_close(own.pos_embed, model.pos_embed, EXACT)
    assert not cache.exists()
