"""Headers come from anybody: every field is checked, and nothing in one loads another file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import slabformer as sf
from saved_digits import INFO, digits_model, save_digits_model
from slabformer.models.detection.config import DetectorConfig
from slabformer.tasks.conversion import Conversion, as_written_now
from slabformer.tasks.detection.saved import DetectorInfo
from slabformer.tasks.saved_file import DIGEST, TIED, digest_of
from slabformer.tasks.saved_model import ModelInfo, load_model, save_model

DETECTOR = DetectorInfo(
    backbone="slab_pvt_tiny", detector=DetectorConfig(num_classes=2), class_names=["a", "b"], category_ids=[3, 7]
)
JUNK: dict[str, Any] = {
    **{"null": None, "number": 7, "negative": -1, "huge": 10**30, "zero": 0, "text": "x", "empty": "", "true": True},
    **{"list": [], "texts": ["x"], "numbers": [0, 0, 0], "nulls": [None], "mapping": {}, "nan": float("nan")},
    **{"nested": [[[[]]]], "other": {"checkpoint_path": "/etc/passwd"}},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_digits_model(tmp_path / "model.safetensors")


def rewrite(path: Path, key: str, change: Callable[[Any], Any]) -> None:
    """Change the JSON in a file's metadata as an attacker would, who can compute checksums too."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    metadata[key] = json.dumps(change(json.loads(metadata.get(key, "{}"))))
    save_file(tensors, path, metadata=metadata | {DIGEST: digest_of(metadata, tensors)})


@pytest.mark.parametrize("name", json.loads(INFO.to_json()))
@pytest.mark.parametrize("kind", [INFO, DETECTOR], ids=["classifier", "detector"])
def test_junk_in_any_field_is_refused_or_means_something(kind: Any, name: str) -> None:
    values = json.loads(kind.to_json())
    if name not in values:
        pytest.skip("a field of the other kind")
    refused = 0
    for junk in JUNK.values():
        try:
            made = type(kind).from_json(json.dumps(values | {name: junk}))
        except ValueError:  # and nothing else
            refused += 1
        else:
            assert json.loads(made.to_json())[name] == junk
    assert refused >= len(JUNK) // 2


FIELDS = [
    ({"model": 7}, "model must be text that is not empty, got 7"),
    ({"model": ""}, "model must not be empty"),
    ({"class_names": [None] * 10}, r"class_names\[0\] must be .*not empty, got None"),
    ({"std": [0.4, 0.0, 0.4]}, r"std\[1\] must be a finite number above 0, got 0.0|std\[1\] must be above 0, got 0.0"),
    ({"mean": [0.1]}, "mean must be .*got 1 of them"),
    ({"input_size": [3, 16]}, "input_size must be .*got 2 of them"),
    ({"input_size": [3, -16, 16]}, r"input_size\[1\] must be in \[1, 65536\], got -16"),
    ({"crop_pct": 0}, "crop_pct must be .*above 0"),
    ({"interpolation": "magic"}, "interpolation must be 'bicubic', .*got 'magic'"),
    ({"fused": "yes"}, "fused must be true or false, got 'yes'"),
    ({"converted": [{"names": ["norm"]}]}, r"converted\[0\]: field 'norm' is missing"),
    ({"converted": 3}, "converted must be .*list"),
    ({"model_args": [1]}, "model_args must be a mapping"),
]


@pytest.mark.parametrize(("change", "message"), FIELDS, ids=[next(iter(change)) for change, _ in FIELDS])
def test_a_field_is_told_with_what_it_must_be(change: dict[str, Any], message: str, saved: Path) -> None:
    rewrite(saved, ModelInfo.KEY, lambda values: values | change)
    with pytest.raises(ValueError, match=f"describes its model in words that cannot be read: .*({message})"):
        load_model(saved)


def test_one_name_for_ten_classes_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="class_names must name the 10 classes of slab_deit_micro, got 1"):
        save_model(digits_model(), saved, replace(INFO, class_names=["one"]))
    rewrite(saved, ModelInfo.KEY, lambda values: values | {"class_names": ["one"]})
    with pytest.raises(ValueError, match="class_names must name the 10 classes"):
        load_model(saved)


@pytest.mark.parametrize("missing", ["model", "class_names"])
def test_a_missing_field_is_named(missing: str, saved: Path) -> None:
    rewrite(saved, ModelInfo.KEY, lambda values: {k: v for k, v in values.items() if k != missing})
    with pytest.raises(ValueError, match=f"field '{missing}' is missing"):
        load_model(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_path", "OTHER"),
        ("pretrained", True),
        ("pretrained_cfg", {"file": "OTHER"}),
        ("pretrained_cfg_overlay", {"file": "OTHER"}),
        ("scriptable", True),
        ("exportable", True),
        ("features_only", True),
        ("cache_dir", "OTHER"),
    ],
)
def test_a_header_loads_no_other_file_and_changes_nothing_else(name: str, value: Any, saved: Path) -> None:
    rewrite(saved, ModelInfo.KEY, lambda info: info | {"model_args": info["model_args"] | {name: value}})
    with pytest.raises(ValueError, match=f"'{name}' is not an argument of slab_deit_micro's architecture"):
        load_model(saved)


def test_deep_nesting_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        ModelInfo.from_json("[" * 100_000)


@pytest.mark.parametrize("ties", [[1], {"a": 1}, {"head.bias": "nowhere"}], ids=str)
def test_ties_to_nothing_are_refused(ties: Any, saved: Path) -> None:
    rewrite(saved, TIED, lambda _: ties)
    with pytest.raises(ValueError, match="tie"):
        load_model(saved)


FUSED = [
    (lambda c: [c], "slabformer_fused must be a mapping"),
    (lambda c: {**c, "norms": "x"}, "norms must be a list"),
    (lambda c: {**c, "norms": [{}]}, r"norms\[0\]: field 'names' is missing"),
    (lambda c: {**c, "norms": [{**c["norms"][0], "dim": -1}]}, r"norms\[0\].dim must be .*at least 1"),
    (
        lambda c: {**c, "new_biases": ["nowhere.bias"]},
        "says that 'nowhere.bias' was folded or tied, but does not hold it",
    ),
    (lambda c: {**c, "tied": {"a": "nowhere"}}, "says that 'nowhere' was folded or tied"),
    (lambda c: {**c, "kept_buffers": {"a": "b"}}, "kept_buffers.a must be"),
    (lambda c: {**c, "more": 1}, "slabformer_fused: unknown field 'more'; a newer slabformer"),
    (lambda c: {k: v for k, v in c.items() if k != "tied"}, "slabformer_fused: field 'tied' is missing"),
]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a fused model, to copy."""
    path = tmp_path_factory.mktemp("fused") / "fused.safetensors"
    save_model(sf.fuse(digits_model(), images())[0], path, INFO)
    return path


@pytest.mark.parametrize(("change", "message"), FUSED, ids=[message.partition(" ")[0] for _, message in FUSED])
def test_the_header_of_a_fused_model_is_checked_too(
    change: Callable[[Any], Any], message: str, fused: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(fused, tmp_path))
    rewrite(path, "slabformer_fused", change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a"]}, "one for each of 2 classes, got 1 and 2"),
        ({"category_ids": [1, 2, 3]}, "one for each of 2 classes, got 2 and 3"),
        ({"category_ids": ["1", "2"]}, r"category_ids\[0\] must be a whole number"),
        ({"size": 0}, r"size must be in \[1, 65536\], got 0"),
        ({"detector": None}, "detector must be a mapping"),
        ({"detector": {"colour": 1}}, "detector: unknown field 'colour'"),
        ({"detector": {"num_classes": "2"}}, "detector.num_classes must be a whole number"),
        ({"backbone_args": {"checkpoint_path": "x"}}, "'checkpoint_path' is not an argument of slab_pvt_tiny"),
        ({"backbone_args": {"published": "x"}}, "argument 'published' of a backbone must be bool or null"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_detectors_fields_are_checked_too(change: dict[str, Any], message: str) -> None:
    text = json.dumps(json.loads(DETECTOR.to_json()) | change)

    def build() -> None:
        info = DetectorInfo.from_json(text)
        info.check_model(info.build())

    with pytest.raises(ValueError, match=message):
        build()


def test_a_conversion_is_checked_wherever_it_comes_from() -> None:
    with pytest.raises(ValueError, match="eps must be"):
        Conversion(names=["norm"], norm="prepbn", eps=-1.0, momentum=None)
    with pytest.raises(ValueError, match=r"names\[0\] must not be empty"):
        Conversion(names=[""], norm="prepbn", eps=1e-5, momentum=None)


def test_conversions_of_the_first_version_are_read(saved: Path) -> None:
    row = {"names": ["norm"], "eps": 1e-5, "momentum": 0.1}
    assert as_written_now([row | {"progressive": False}]) == [row | {"norm": "repbn"}]
    values = json.loads(load_model(saved)[1].to_json()) | {"converted": [row | {"progressive": True}]}
    assert ModelInfo.from_json(json.dumps(values)).converted == [Conversion(**row, norm="prepbn")]
