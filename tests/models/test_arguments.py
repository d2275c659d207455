"""Files and recipes set what a model is, and nothing that loads or changes something else."""

from __future__ import annotations

from typing import Any

import pytest

from slabformer.models.arguments import architecture_of, check_arguments

LOADERS = {
    **{"checkpoint_path": "/tmp/other.pth", "pretrained": True, "pretrained_cfg": {"url": "x"}},
    **{"pretrained_cfg_overlay": {"file": "x"}, "cache_dir": "x", "scriptable": True, "exportable": True},
    **{"no_jit": True, "features_only": True, "feature_cfg": {}, "pretrained_strict": False, "kwargs_filter": []},
    **{"model_cfg": "x", "device": "meta", "dtype": "float64", "out_indices": [0]},
}


@pytest.mark.parametrize("model", ["slab_deit_micro", "resnet18", "vit_tiny_patch16_224", "efficientnet_b0"])
@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_architecture_is_refused(name: str, model: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not an argument of {model}'s architecture"):
        check_arguments(model, {name: LOADERS[name]})


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("slab_deit_micro", {"embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1, "img_size": 32}),
        ("slab_swin_tiny", {"depths": [1, 1, 1, 1], "attention": ["softmax"] * 4, "norm": "prepbn", "window_size": 7}),
        ("slab_pvt_v2_b0", {"num_classes": 3, "drop_rate": 0.1, "norm": "dyt"}),
        ("resnet18", {"num_classes": 3, "in_chans": 1, "block_args": {"attn_layer": "se"}, "norm_layer": None}),
    ],
    ids=["deit", "swin", "pvt_v2", "resnet"],
)
def test_an_architecture_is_allowed(model: str, arguments: dict[str, Any]) -> None:
    check_arguments(model, arguments)


@pytest.mark.parametrize(
    "value",
    [10**9, float("nan"), float("-inf"), "../../etc/passwd", "x" * 100, list(range(1000)), [[[[[[1]]]]]], {1: 2}, b"x"],
    ids=["large", "nan", "inf", "path", "long", "many", "deep", "keys", "bytes"],
)
def test_a_value_that_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="argument 'embed_dim' of slab_deit_micro must be numbers up to 1,000,000"):
        check_arguments("slab_deit_micro", {"embed_dim": value})


def test_a_misspelt_argument_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'embed_dims' is not an argument .*; did you mean 'embed_dim'\?"):
        check_arguments("slab_deit_micro", {"embed_dims": 3})
    assert "embed_dim" in architecture_of("slab_deit_micro")
