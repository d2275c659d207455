"""Every recipe for detection holds what was published, states all of it, and trains."""

from __future__ import annotations

import copy
import functools
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
import yaml

import slabformer as sf
from detectors import objects, pictures
from recipes_of import RECIPES
from slabformer.cli.detect.train import parser, to_train_config
from slabformer.models.detection.config import DetectorConfig
from slabformer.tasks.detection.build import build_model, decay_groups
from slabformer.tasks.detection.config import DecayConfig, DetectionAugment, RateConfig, TrainConfig
from slabformer.tasks.detection.rate import RateSchedule
from slabformer.tasks.engine.build import build_optimizer
from slabformer.tasks.engine.config import FadeConfig

NAMES = [path.stem for path in sorted(RECIPES.glob("detection_*.yaml"))]
PUBLISHED_SIZES = tuple(range(480, 801, 32))


class Row(NamedTuple):
    """One published configuration: what differs between them."""

    model: str
    config: str | None
    epochs: int = 12
    milestones: tuple[int, ...] = (8, 11)
    drop_path: float = 0.1
    lr: float = 1e-4
    weight_decay: float = 0.05
    policy: str = "multiscale"
    precision: str = "bf16"


THREE_TIMES: dict[str, Any] = {"epochs": 36, "milestones": (27, 33), "drop_path": 0.2}
PVT: dict[str, Any] = {"policy": "single", "precision": "fp32"}
ROWS = {
    "slab_swin_tiny_1x": Row("slab_swin_tiny", "slab_swin_tiny 1x"),
    "slab_swin_small_1x": Row("slab_swin_small", "slab_swin_small 1x", drop_path=0.2),
    "swin_tiny_prepbn_1x": Row("swin_tiny_prepbn", "swin_tiny_prepbn 1x"),
    "swin_small_prepbn_1x": Row("swin_small_prepbn", "swin_small_prepbn 1x", drop_path=0.2),
    "swin_tiny_prepbn_3x": Row("swin_tiny_prepbn", "swin_tiny_prepbn 3x", **THREE_TIMES),
    "swin_small_prepbn_3x": Row("swin_small_prepbn", "swin_small_prepbn 3x", **THREE_TIMES),
    "pvt_tiny_prepbn_1x": Row("pvt_tiny_prepbn", "pvt_t_prepbn 1x", **PVT),
    "pvt_small_prepbn_1x": Row("pvt_small_prepbn", "pvt_s_prepbn 1x", lr=2e-4, weight_decay=1e-4, **PVT),
    "slab_swin_tiny_3x": Row("slab_swin_tiny", None, **THREE_TIMES),
    "slab_swin_small_3x": Row("slab_swin_small", None, **THREE_TIMES),
}
#: what a recipe may leave out, since the embedded run has the plain value too
PLAIN: dict[str, dict[str, Any]] = {
    "model": {
        **dict.fromkeys(("norm", "output_norm", "backbone_weights", "weights")),
        **dict.fromkeys(
            ("convert_norms", "pretrained", "new_predictors", "freeze_backbone", "checkpoint_activations"), False
        ),
        "freeze_norms": "auto",
    },
    "detector": vars(DetectorConfig()),
    "augment": vars(DetectionAugment()),
    "optimizer": {"layer_decay": None},
    "lr_schedule": vars(RateConfig()),
    "gamma": vars(FadeConfig()),
}
published = pytest.mark.parametrize("name", ROWS)


def path_of(name: str) -> Path:
    return RECIPES / f"detection_{name}.yaml"


@functools.cache
def load(name: str) -> TrainConfig:
    return to_train_config(parser().parse_args(["--config", str(path_of(name))]))


def test_there_is_a_recipe_for_every_published_configuration_and_for_the_embedded_run() -> None:
    assert {f"detection_{name}" for name in (*ROWS, "digits")} == set(NAMES)
    assert sum(row.config is not None for row in ROWS.values()) == 8


def test_no_options_at_all_mean_the_embedded_recipe() -> None:
    assert load("digits") == TrainConfig()


@published
def test_the_header_names_the_configuration_and_the_cost(name: str) -> None:
    told = path_of(name).read_text().split("model:")[0]
    config = ROWS[name].config
    assert ("not published" in told) if config is None else (config in told)
    assert "Cost" in told


@published
def test_backbone_schedule_and_precision_are_the_published_ones(name: str) -> None:
    config, row = load(name), ROWS[name]
    assert (config.model.backbone, config.model.args) == (row.model, {"drop_path_rate": row.drop_path})
    assert config.model.published == ("swin" in row.model)
    assert config.model.output_norm == ("layernorm" if "swin" in row.model else "none")
    assert config.lr_schedule == RateConfig(name="step", milestones=list(row.milestones))
    assert (config.epochs, config.batch_size, config.accumulate) == (row.epochs, 2, 1)
    assert (config.precision, config.cpu_threads) == (row.precision, None)
    assert config.output == f"runs/detection_{name}"


@published
def test_optimizer_and_decay_are_the_published_ones(name: str) -> None:
    row = ROWS[name]
    spared = [] if "pvt" in name else ["norm", "relative_position_bias_table", "absolute_pos_embed"]
    assert load(name).optimizer == DecayConfig(
        name="adamw", lr=row.lr, lr_base_batch=16, weight_decay=row.weight_decay, clip_norm=None,
        args={"betas": [0.9, 0.999], "eps": 1e-8}, no_decay=spared, decay_vectors=True,
    )  # fmt: skip


@published
def test_heads_and_images_are_the_published_ones(name: str) -> None:
    config = load(name)
    assert config.detector == DetectorConfig()
    assert config.augment == DetectionAugment(policy=ROWS[name].policy)  # type: ignore[arg-type]
    assert config.augment.sizes == PUBLISHED_SIZES
    assert config.data.masks


@published
def test_layernorm_fades_within_the_run_where_the_published_count_never_ends(name: str) -> None:
    assert load(name).gamma == FadeConfig(warmup=0.0, fade=0.5, shape="linear")


@published
def test_nothing_of_the_embedded_run_is_left_in_a_recipe_for_coco(name: str) -> None:
    written = yaml.safe_load(path_of(name).read_text())
    ours, own = TrainConfig().to_dict(), load(name).to_dict()
    embedded = {
        f"{group}.{key}"
        for group in ("model", "detector", "augment", "optimizer", "lr_schedule", "gamma")
        for key, value in ours[group].items()
        if value == own[group][key] and key not in written.get(group, {}) and value != PLAIN[group].get(key)
    }
    assert not embedded


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        *(pytest.param(f"{name}_1x", marks=pytest.mark.slow) for name in ("slab_swin_tiny", "pvt_small_prepbn")),
    ],
)
def test_one_step_runs(name: str) -> None:
    """One block a stage, small images; all else as it is."""
    config = copy.deepcopy(load(name))
    if name != "digits":
        config.model.args |= {"depths": [1, 1, 1, 1], "img_size": 64}
    detector = build_model(config.model, config.detector, [str(i) for i in range(config.detector.num_classes)])
    optimizer = build_optimizer(config.optimizer, detector, 16, lambda model: decay_groups(config.optimizer, model))
    RateSchedule(optimizer, config.lr_schedule, epochs=config.epochs, steps_per_epoch=7_330)
    fading = [module for module in detector.modules() if isinstance(module, sf.PRepBN)]
    assert fading
    before = {name: parameter.detach().clone() for name, parameter in detector.named_parameters()}
    losses = detector(pictures((64, 80), (64, 80)), [objects(2, (64, 80), seed) for seed in range(2)])
    sum(losses.values()).backward()
    optimizer.step()
    moved = {name for name, parameter in detector.named_parameters() if not torch.equal(parameter, before[name])}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert {"backbone.body.body.patch_embed.proj.weight", "roi_heads.box_predictor.cls_score.weight"} <= moved


def test_every_key_is_explained_on_the_command_line() -> None:
    text = " ".join(parser().format_help().split())
    owners = (TrainConfig, *(kind for kind in get_type_hints(TrainConfig).values() if is_dataclass(kind)))
    assert len(owners) == 9
    names = [field.name for owner in owners for field in fields(owner) if field.name != "twin"]  # until 0.3, unseen
    assert not [name for name in names if name.replace("_", "-") not in text]
    for told in (
        "Also train the LayerNorm baseline",
        "An anchor is positive if its IoU with an object",
        "Optimizer steps of linear",
    ):
        assert told in text
