"""From a recipe to a detector: weights, classes, frozen statistics, and what does not go together."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import slabformer as sf
from detectors import SMALL, SMALL_SWIN, objects, pictures, saved, small_config
from slabformer.models.detection.mask_rcnn import Detector
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.nn.norms import norm_types
from slabformer.tasks.conversion import count_norms
from slabformer.tasks.detection.build import (
    PREDICTORS,
    backbone_args,
    backbone_of,
    build_fading,
    build_model,
    decay_groups,
    live_norms,
)
from slabformer.tasks.detection.config import DecayConfig, ModelConfig
from slabformer.tasks.detection.saved import load_detector
from slabformer.tasks.engine.build import build_optimizer
from slabformer.tasks.engine.config import FadeConfig
from slabformer.tasks.saved_model import ModelInfo, create_model, save_model
from tiny_training import assert_same

CLASSES = ["cat", "dog", "emu"]


def built(classes: list[str] | None = None, **model: Any) -> Detector:
    names = classes or CLASSES
    return build_model(ModelConfig(**{"args": SMALL_SWIN, **model}), small_config(num_classes=len(names)), names)


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("saved") / "model.safetensors"))


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("saved") / "classifier.safetensors"
    model = create_model("slab_swin_tiny", num_classes=5, **SMALL_SWIN)
    sf.testing.randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    info = ModelInfo(
        model="slab_swin_tiny",
        model_args={"num_classes": 5, **SMALL_SWIN},
        class_names=list("abcde"),
        input_size=(3, 64, 64),
    )
    save_model(model, path, info)
    return str(path)


def fading_of(detector: Detector) -> set[nn.Module]:
    optimizer = build_optimizer(DecayConfig(), detector, 8, lambda model: decay_groups(DecayConfig(), model))
    schedule = build_fading(FadeConfig(fade=0.5), detector, optimizer, 100)
    return set() if schedule is None else {norm for norm in prepbn_modules(detector).values() if norm.phase != "done"}


def test_from_scratch_every_statistic_moves_and_every_norm_fades() -> None:
    detector = built()
    assert detector.training
    assert not backbone_of(detector).frozen_statistics
    assert set(live_norms(detector)) == set(repbn_modules(detector).values())
    assert fading_of(detector) == set(prepbn_modules(detector).values())


def test_a_classifier_s_weights_freeze_its_statistics_and_fade_nothing(
    classifier_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="slabformer"):
        detector = built(backbone_weights=classifier_file)
    assert "new in a detector: output_norms.0.weight" in caplog.text
    assert "of the classifier alone: norm." in caplog.text
    assert backbone_of(detector).frozen_statistics
    assert len(live_norms(detector)) == 0
    assert fading_of(detector) == set()


def test_released_weights_are_fetched_to_train_and_never_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from slabformer.tasks.detection import build as module

    asked: list[bool] = []
    create = module.create_backbone

    def fetch(name: str, pretrained: bool = False, **args: Any) -> nn.Module:
        asked.append(pretrained)
        backbone = create(name, **args)
        for norm in prepbn_modules(backbone).values():
            norm.set_gamma(0.0)  # as released
        return backbone

    monkeypatch.setattr(module, "create_backbone", fetch)
    config = ModelConfig(args=SMALL_SWIN, pretrained=True)
    detector = build_model(config, small_config(), CLASSES)
    assert asked == [True]
    assert backbone_of(detector).frozen_statistics
    assert "pretrained" not in backbone_args(config)


def test_new_output_norms_fade_and_move_above_a_frozen_backbone(classifier_file: str) -> None:
    detector = built(backbone_weights=classifier_file, output_norm="prepbn")
    outputs = backbone_of(detector).output_norms
    assert fading_of(detector) == set(outputs)
    assert set(live_norms(detector)) == set(repbn_modules(outputs).values())
    detector.train()
    assert all(norm.training for norm in outputs.modules())
    assert not any(norm.training for norm in repbn_modules(backbone_of(detector).body).values())


@pytest.mark.parametrize(("freeze", "frozen"), [("auto", True), ("always", True), ("never", False)])
def test_statistics_may_be_frozen_or_not_by_name(freeze: str, frozen: bool, classifier_file: str) -> None:
    detector = built(backbone_weights=classifier_file, freeze_norms=freeze)
    assert backbone_of(detector).frozen_statistics == frozen


def test_a_frozen_backbone_trains_the_heads_alone(detector_file: str) -> None:
    detector = built(weights=detector_file, freeze_backbone=True)
    trained = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("backbone.body.body.") for name in trained)
    assert any(name.startswith("backbone.fpn.") for name in trained)
    assert any(name.startswith("rpn.") for name in trained)


def test_a_whole_detector_is_gone_on_from(detector_file: str) -> None:
    expected = load_detector(detector_file)[0].state_dict()
    assert_same(built(weights=detector_file).state_dict(), expected)


def test_another_number_of_classes_is_refused_with_the_way_out(detector_file: str) -> None:
    with pytest.raises(ValueError, match=r"knows 3 classes, the data 2; .*--model.new-predictors drops its layers"):
        built(["cat", "owl"], weights=detector_file)


def test_new_predictors_keep_all_but_what_names_classes(detector_file: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="slabformer"):
        state = built(["cat", "owl"], weights=detector_file, new_predictors=True).state_dict()
    given = built(weights=detector_file).state_dict()
    fresh = {name for name in given if not torch.equal(given[name], state.get(name, torch.empty(0)))}
    assert fresh == {name for name in given if name.startswith(PREDICTORS)}
    assert len(state["roi_heads.box_predictor.cls_score.weight"]) == 3
    assert "6 tensors dropped for new classes: roi_heads.box_predictor.cls_score.weight" in caplog.text


def test_other_names_for_as_many_classes_are_told(detector_file: str, caplog: pytest.LogCaptureFixture) -> None:
    built(["cat", "dog", "owl"], weights=detector_file)
    assert (
        "1 classes are called otherwise than in the detector (first: label 3 is 'owl' here, 'emu' there)" in caplog.text
    )


def test_weights_of_other_sizes_are_refused_with_the_way_out(detector_file: str) -> None:
    with pytest.raises(
        ValueError, match=r"does not fit the recipe \(the config.yaml beside the file does\): 27 tensors unexpected"
    ):
        built(weights=detector_file, args={**SMALL_SWIN, "depths": (1, 1, 1, 1)})


def test_a_classifier_is_no_detector_and_the_other_way_round(detector_file: str, classifier_file: str) -> None:
    with pytest.raises(ValueError, match="holds a classifier, for `slab`"):
        built(weights=classifier_file)
    with pytest.raises(ValueError, match="holds a detector, for `slab detect`"):
        built(backbone_weights=detector_file)


@pytest.mark.parametrize("norm", ["batchnorm", "rmsnorm", "layernorm"])
def test_any_norm_is_a_setting_of_a_backbone_of_ours_and_of_timm(norm: str) -> None:
    title = norm_types()[norm].title
    ours = backbone_of(built(norm=norm, output_norm=norm))
    assert set(count_norms(ours)) == {title}
    timms = backbone_of(built(backbone="vit_tiny_patch16_224", args=SMALL["deit"], norm=norm))
    assert set(count_norms(timms)) == {title}


def test_any_model_of_timm_can_be_converted() -> None:
    model = ModelConfig(
        backbone="convnext_atto", args={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, convert_norms=True
    )
    detector = build_model(model, small_config(), CLASSES)
    converted = prepbn_modules(backbone_of(detector).body)
    norms = [name for name, module in backbone_of(detector).body.named_modules() if isinstance(module, nn.LayerNorm)]
    assert len(converted) == len(norms) > 0  # those that fade


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "a", "backbone_weights": "b"}, "give one of model.weights"),
        ({"new_predictors": True}, "give model.weights"),
        ({"args": {"pretrained": True}}, "say model.pretrained"),
        ({"freeze_backbone": True}, "needs a trained one"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


def test_frozen_norms_need_trained_statistics() -> None:
    with pytest.raises(ValueError, match="freeze_norms needs trained statistics"):
        built(freeze_norms="always")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        built(weights="nowhere.safetensors")


def test_checkpointed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        detector = built(checkpoint_activations=checkpoint)
        torch.manual_seed(1)
        sum(detector(pictures((64, 64)), [objects(2, (64, 64))]).values()).backward()
        gradients.append({name: p.grad for name, p in detector.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
