"""From a recipe to a detector, and to what its optimizer decays."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from slabformer._detector import DetectorConfig
from slabformer._files import check_readable
from slabformer.models.detection.backbones import (
    Backbone,
    check_backbone_arguments,
    create_backbone,
    freeze_norm_statistics_,
)
from slabformer.models.detection.mask_rcnn import Detector, build_detector
from slabformer.models.detection.weights import load_backbone_weights
from slabformer.models.registry import is_ours
from slabformer.nn.controls import norm_parameters, prepbn_modules, repbn_modules
from slabformer.progressive import ProgressiveSchedule
from slabformer.tasks.conversion import apply_norms_, norm_arguments
from slabformer.tasks.detection.config import DecayConfig, ModelConfig
from slabformer.tasks.detection.saved import DetectorInfo, compare_classes, load_detector
from slabformer.tasks.engine.build import build_gamma_schedule
from slabformer.tasks.engine.config import FadeConfig
from slabformer.tasks.saved_file import check_saved, load_strictly
from slabformer.tasks.saved_model import ModelInfo, load_model

logger = logging.getLogger(__name__)

#: layers with an output for every class
PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


def build_model(config: ModelConfig, settings: DetectorConfig, class_names: list[str]) -> Detector:
    """The detector of a recipe, weights loaded and statistics frozen as it says, in train mode.

    Raises:
        ValueError: If the backbone is unknown, or weights do not fit it or the classes.
        FileNotFoundError: If a file of weights is missing.
    """
    fetched: dict[str, Any] = {"pretrained": True} if config.pretrained else {}
    detector = build_detector(create_backbone(config.backbone, **backbone_args(config), **fetched), settings)
    backbone = backbone_of(detector)
    apply_norms_(backbone, config, backbone_args(config), config.backbone)
    if config.backbone_weights is not None:
        _load_backbone(backbone, config.backbone_weights)
    if config.weights is not None:
        _load_detector(detector, config.weights, class_names, config.new_predictors)
    _freeze(backbone, config)
    if config.checkpoint_activations:
        backbone.set_grad_checkpointing()
    return detector


def check_model(config: ModelConfig) -> None:
    """Refuse a backbone that could not be built, and files that are no weights, before data is read.

    Raises:
        FileNotFoundError: If a file of weights is missing.
        PermissionError: If it cannot be read.
        ValueError: As :func:`build_model`, as far as that can be told without memory for weights.
    """
    if config.weights is not None:
        check_saved(Path(config.weights), DetectorInfo)
    if config.backbone_weights is not None:
        check_readable(config.backbone_weights, "weights")
        if config.backbone_weights.endswith(".safetensors"):
            check_saved(Path(config.backbone_weights), ModelInfo)
    arguments = backbone_args(config)
    if is_ours(config.backbone):  # timm has models that cannot be built like this
        with torch.device("meta"):
            create_backbone(config.backbone, **arguments)


def backbone_args(config: ModelConfig) -> dict[str, Any]:
    """What :func:`slabformer.models.detection.backbones.create_backbone` is given beside the name.

    Raises:
        ValueError: If one of ``config.args`` is not of the backbone's architecture.
    """
    check_backbone_arguments(config.backbone, config.args)
    switches = {
        "output_norm": config.output_norm,
        "published": config.published or None,
        **norm_arguments(config, is_ours(config.backbone)),
    }
    return {**config.args, **{name: value for name, value in switches.items() if value is not None}}


def backbone_of(detector: Detector) -> Backbone:
    """Its backbone, without the feature pyramid."""
    backbone = detector.backbone.body
    assert isinstance(backbone, Backbone)
    return backbone


def _load_backbone(backbone: Backbone, path: str) -> None:
    source: Any = path
    if path.endswith(".safetensors"):
        model, info = load_model(path)
        if info.fused:
            raise ValueError(f"{path} holds a fused model, whose norms are gone; train from the file before fusing")
        source = model.state_dict()
    report = load_backbone_weights(backbone, source)
    for what, names in (("new in a detector", report.missing), ("of the classifier alone", report.dropped)):
        if names:
            logger.info("%s: %d tensors %s: %s", path, len(names), what, ", ".join(names))


def _load_detector(detector: Detector, path: str, class_names: list[str], new_predictors: bool) -> None:
    """Load a whole detector's weights, but for the layers that name classes where these are to be new."""
    given, info = load_detector(path)
    if info.fused:
        raise ValueError(f"{path} holds a fused detector, whose norms are gone; train from the file before fusing")
    state, fresh = given.state_dict(), []
    if new_predictors:
        own = detector.state_dict()
        fresh = [name for name in own if name.startswith(PREDICTORS)]
        state = {name: own[name] if name in fresh else value for name, value in state.items()}
        logger.info("%s: %d tensors dropped for new classes: %s", path, len(fresh), ", ".join(fresh))
    else:
        compare_classes(info, class_names)
    load_strictly(detector, state, f"{path} does not fit the recipe (the config.yaml beside the file does)")


def _freeze(backbone: Backbone, config: ModelConfig) -> None:
    """Freeze statistics where asked, or where weights brought them; all of the backbone where asked."""
    faded = all(norm.phase == "done" for norm in prepbn_modules(backbone.body).values())
    if config.freeze_norms == "always" and not config.starts_trained:
        raise ValueError("model.freeze_norms needs trained statistics; give model.backbone_weights or leave it at auto")
    if config.freeze_backbone and not faded:
        raise ValueError("model.freeze_backbone needs norms that have faded; train the weights to the end first")
    brought = config.freeze_norms == "auto" and config.starts_trained and faded
    if config.freeze_norms == "always" or config.freeze_backbone or brought:
        freeze_norm_statistics_(backbone)
    if config.freeze_backbone:
        backbone.body.requires_grad_(False)


def live_norms(detector: Detector) -> nn.ModuleList:
    """Its RepBNs whose statistics move in training."""
    backbone = backbone_of(detector)
    frozen = set(repbn_modules(backbone.body).values()) if backbone.frozen_statistics else set()
    return nn.ModuleList(norm for norm in repbn_modules(detector).values() if norm not in frozen)


def build_fading(
    config: FadeConfig, detector: Detector, optimizer: Optimizer, total_steps: int
) -> ProgressiveSchedule | None:
    """The fading of those norms that have not faded before; None if there are none."""
    fading = nn.ModuleList(norm for norm in prepbn_modules(detector).values() if norm.phase != "done")
    return build_gamma_schedule(config, fading, optimizer, total_steps)


def decay_groups(config: DecayConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Parameters that train, in a group that decays and one that does not."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    norms = norm_parameters(model) if "norm" in config.no_decay else {}  # whatever they are called
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            named = name in norms or any(key in name for key in config.no_decay)
            spared = named or (parameter.ndim < 2 and not config.decay_vectors)
            groups[not spared].append(parameter)
    rates = {False: 0.0, True: config.weight_decay}
    return [{"params": group, "weight_decay": rates[decays]} for decays, group in groups.items() if group]
