"""Evaluation of a detector: perfect and absent detections, original sizes, batches; files that keep what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coco_files import write_root
from detectors import pictures, saved, small_detector, trained_looking
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.detection.config import DetectionAugment, DetectionData
from slabformer.tasks.detection.evaluate import at_original_size, collect, evaluate, flat
from slabformer.tasks.detection.loader import DetectionLoader, create_loader
from slabformer.tasks.detection.saved import DetectorInfo, load_detector, save_detector
from slabformer.tasks.saved_model import load_model

RESIZED = DetectionAugment(policy="none", size=96, max_size=128)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("coco") / "root")


def loader_of(root: Path, batch_size: int = 1, masks: bool = True) -> DetectionLoader:
    data = DetectionData(path=str(root), masks=masks)
    return create_loader(data, RESIZED, "validation", batch_size=batch_size, seed=0)


class Oracle(nn.Module):
    """Finds what the targets hold, in the order that they come; masks fill their boxes."""

    def __init__(self, loader: DetectionLoader, masks: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = [target for batch in loader for target in batch.targets]
        self.masks = masks

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        targets, self.answers = self.answers[: len(images)], self.answers[len(images) :]
        return [self._answer(target["boxes"], target["labels"]) for target in targets]

    def _answer(self, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        masks = {"masks": torch.ones(len(boxes), 1, 28, 28)} if self.masks else {}
        return {"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes)), **masks}


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes alone"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_perfect_detections_on_resized_images_score_100(root: Path, batch_size: int, masks: bool) -> None:
    loader = loader_of(root, batch_size, masks)
    figures = flat(evaluate(Oracle(loader, masks), loader))
    kinds = ("box", "mask") if masks else ("box",)
    assert {figures[f"{kind}_{name}"] for kind in kinds for name in ("ap", "ap50", "ap75", "ar100")} == {100.0}
    assert not any(name.endswith("apl") for name in figures)  # no object is large
    assert masks or not any(name.startswith("mask") for name in figures)


class Blind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        return [{**nothing, "masks": torch.zeros(0, 1, 28, 28)} for _ in images]


def test_a_detector_that_finds_nothing_scores_0(root: Path) -> None:
    figures = flat(evaluate(Blind(), loader_of(root)))
    assert figures["box_ap"] == figures["mask_ap"] == 0.0


def test_boxes_come_back_in_pixels_of_the_original() -> None:
    found = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 60.0]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.5]),
        "masks": torch.ones(1, 1, 28, 28),
    }
    placed = at_original_size(found, size=(100, 200), original_size=(50, 400))
    assert placed["boxes"].tolist() == [[20.0, 10.0, 60.0, 30.0]]
    assert placed["masks"].shape == (1, 50, 400)
    assert placed["masks"][0].nonzero().aminmax(dim=0).max.tolist() == [29, 59]
    assert placed["masks"].sum() == 20 * 40


def test_the_company_of_a_batch_changes_nothing(root: Path) -> None:
    detector = trained_looking(small_detector())
    results = [collect(detector, loader_of(root, batch_size)).results() for batch_size in (1, 3)]
    assert results[0] == results[1]
    assert results[0]


def test_modes_are_put_back(root: Path) -> None:
    detector = small_detector()
    frozen = next(iter(prepbn_modules(detector).values())).eval()
    evaluate(detector, loader_of(root))
    assert detector.training
    assert not frozen.training


def detections(detector: nn.Module) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return detector(pictures((64, 75), (64, 64)))


@pytest.mark.parametrize("backbone", [{}, {"output_norm": "prepbn"}, {"norm": "layernorm"}], ids=str)
def test_a_detector_comes_back_as_it_was(tmp_path: Path, backbone: dict[str, Any]) -> None:
    detector = trained_looking(small_detector(backbone=backbone))
    loaded, info = load_detector(saved(tmp_path / "model.safetensors", detector, **backbone))
    assert (info.class_names, info.category_ids) == (["cat", "dog", "emu"], [3, 5, 8])
    assert (info.size, info.max_size, info.fused) == (64, 96, False)
    assert info.detector == detector.config
    assert not loaded.training
    expected = detections(detector)
    assert sum(len(found["boxes"]) for found in expected) > 0
    for own, other in zip(detections(loaded), expected, strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)


def test_a_converted_backbone_of_timm_s_comes_back(tmp_path: Path) -> None:
    import slabformer as sf
    from slabformer.models.detection.backbones import create_backbone
    from slabformer.models.detection.mask_rcnn import build_detector

    arguments = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    config = small_detector().config
    detector = build_detector(create_backbone("convnext_atto", **arguments), config)
    sf.convert_norms_(detector.backbone.body)
    info = DetectorInfo(
        backbone="convnext_atto",
        backbone_args=arguments,
        detector=config,
        class_names=list("abc"),
        category_ids=[1, 2, 3],
    )
    written = save_detector(trained_looking(detector), tmp_path / "model.safetensors", info)
    assert written.converted
    loaded, _ = load_detector(tmp_path / "model.safetensors")
    assert prepbn_modules(loaded).keys() == prepbn_modules(detector).keys()
    for own, other in zip(detections(loaded), detections(detector), strict=True):
        assert torch.equal(own["boxes"], other["boxes"])


def test_a_detector_is_told_from_a_classifier_and_from_damage(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds a detector, for `slab detect`"):
        load_model(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was altered after it was saved"):
        load_detector(path)
