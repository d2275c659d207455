"""A fused model in integers: what it computes, what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slabformer as sf
from slabformer.export import openvino_run
from slabformer.quantize.openvino import Int8Model, quantize, to_openvino
from small_models import images, trained_looking


@pytest.fixture(scope="module")
def fused() -> torch.nn.Module:
    return sf.fuse(trained_looking(), images())[0]


@pytest.fixture(scope="module")
def integers(fused: torch.nn.Module) -> Int8Model:
    return quantize(fused, [images(32, seed) for seed in range(2)], threads=1)


@torch.no_grad()
def test_openvino_computes_what_the_model_does(fused: torch.nn.Module) -> None:
    torch.testing.assert_close(to_openvino(fused, images())(images(3)), fused(images(3)), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_integers_are_near_the_floats_and_are_integers(fused: torch.nn.Module, integers: Int8Model) -> None:
    fresh = images(64, seed=9)
    floats, rounded = fused(fresh), integers(fresh)
    difference = (rounded - floats).square().mean().sqrt() / floats.std()
    assert 1e-4 < difference < 0.1
    kinds = [node.get_type_name() for node in integers.graph.get_ops()]
    assert kinds.count("FakeQuantize") > kinds.count("MatMul")


@torch.no_grad()
def test_files_give_the_same_integers(integers: Int8Model, tmp_path: Path) -> None:
    files = integers.save(tmp_path / "model.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert torch.equal(Int8Model(tmp_path / "model.xml", threads=1)(images(5)), integers(images(5)))
    (tmp_path / "model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"the \.bin beside it"):
        Int8Model(tmp_path / "model.xml")


@torch.no_grad()
def test_few_batch_sizes_stay_compiled(integers: Int8Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_run, "MAX_BATCH_SIZES", 2)
    integers.run.requests.clear()
    outputs = {n: integers(images(n)) for n in range(1, 4)}
    assert list(integers.run.requests) == [2, 3]
    for batch_size, output in outputs.items():
        torch.testing.assert_close(integers(images(batch_size)), output)


def test_a_model_with_norms_to_fold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call slabformer\.fuse first"):
        quantize(trained_looking(), [images()])


def test_no_images_are_refused(fused: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        quantize(fused, [])
