"""A detector of fixed shapes, and as ONNX, detects what the detector does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slabformer as sf
from detectors import ODD_SIZES, pictures, small_detector, trained_looking
from slabformer.export import detector as module
from slabformer.export.detector import OnnxDetector, export_detector, without_padding
from slabformer.export.static_detector import StaticDetector
from slabformer.models.detection.mask_rcnn import Detector
from tolerances import EXACT, FLOAT32, assert_close

CANVAS = (160, 160)


@pytest.fixture(scope="module")
def detector() -> Detector:
    """One that finds ten objects in noise, the least of which it is hardly sure of."""
    return trained_looking(small_detector())


@torch.no_grad()
def on_a_canvas(static: StaticDetector, image: torch.Tensor) -> dict[str, torch.Tensor]:
    return without_padding(static(**static.inputs(image)))


@pytest.mark.parametrize("size", [*ODD_SIZES, CANVAS], ids=lambda size: "x".join(map(str, size)))
@torch.no_grad()
def test_fixed_shapes_change_no_detection(detector, size):
    (image,) = pictures(size)
    expected = detector([image, torch.zeros(3, *CANVAS)])[0]
    found = on_a_canvas(StaticDetector(detector, CANVAS), image)
    assert len(expected["labels"]) > 0
    assert_close(found["labels"], expected["labels"], EXACT)
    for key in ("boxes", "scores", "masks"):
        assert_close(found[key], expected[key], FLOAT32)


@torch.no_grad()
def test_what_is_no_detection_scores_below_zero(detector):
    detector = trained_looking(small_detector(masks=False, score_threshold=0.9))
    (image,) = pictures((97, 130))
    outputs = StaticDetector(detector, CANVAS)(torch.zeros(3, *CANVAS), torch.tensor(CANVAS))
    boxes, labels, scores = outputs.values()
    assert boxes.shape == (10, 4)
    assert labels.shape == scores.shape == (10,)
    expected = detector([image, torch.zeros(3, *CANVAS)])[0]
    found = on_a_canvas(StaticDetector(detector, CANVAS), image)
    assert len(found["labels"]) == len(expected["labels"]) < 10


@torch.no_grad()
def test_few_candidates_keep_the_best(detector):
    (image,) = pictures(CANVAS)
    few, all_of_them = (on_a_canvas(StaticDetector(detector, CANVAS, count), image) for count in (3, 4096))
    assert len(few["labels"]) <= 3
    assert_close(few["scores"][:1], all_of_them["scores"][:1], FLOAT32)


def test_a_canvas_is_rounded_up_to_what_the_backbone_takes(detector):
    assert StaticDetector(detector, (100, 129)).size == (128, 160)


def test_train_mode_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="eval mode"):
        export_detector(small_detector(), [], tmp_path / "detector.onnx", size=CANVAS)


@pytest.mark.parametrize(("content", "error"), [(None, FileNotFoundError), ("nonsense", ValueError)])
def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, content, error):
    path = tmp_path / "detector.onnx"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=r"detector\.onnx"):
        OnnxDetector(path)


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory) -> Path:
    """``detector`` as ONNX, compared on images of several sizes, one of which has to shrink."""
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    agreement = export_detector(
        detector, pictures(*ODD_SIZES, (200, 320)), path, size=CANVAS, metadata={"told": "by the caller"}
    )
    assert agreement.num_images == 4
    assert agreement.num_detections > 4
    assert 0 < agreement.max_pixels < 1e-2
    assert agreement.max_score < 1e-4
    return path


@pytest.mark.slow
@torch.no_grad()
def test_onnx_detects_what_pytorch_does(detector, exported):
    file = OnnxDetector(exported)
    assert file.metadata["told"] == "by the caller"
    assert file.size == CANVAS
    (image,) = pictures((150, 150), seed=1)
    expected, found = detector([image])[0], file(image)  # both pad it to 160x160
    assert found.keys() == expected.keys()
    assert torch.equal(found["labels"], expected["labels"])
    assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-2)


@pytest.mark.slow
def test_a_larger_image_has_its_boxes_in_its_own_pixels(exported):
    file = OnnxDetector(exported)
    (image,) = pictures((160, 80))
    large = torch.nn.functional.interpolate(image[None], scale_factor=2, mode="nearest")[0]
    for detection, size in ((file(image), (160, 80)), (file(large), (320, 160))):
        assert (detection["boxes"] <= torch.tensor([*reversed(size)]).repeat(2)).all()
    assert file(large)["boxes"][:, 3].max() > 160


@pytest.mark.slow
def test_a_file_that_detects_something_else_is_refused(detector, exported, monkeypatch):
    class Moved(OnnxDetector):
        def __call__(self, image):
            found = super().__call__(image)
            return found | {"boxes": found["boxes"] + 0.1}

    with pytest.raises(sf.VerificationError, match=r"boxes differ by 0\.1"):
        module._compare(detector, Moved(exported), pictures(CANVAS), 0.05)
